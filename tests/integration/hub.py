"""Model hub on this machine for the real ``huggingface_hub`` client."""

import base64
import hashlib
import importlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest
from typing_extensions import override

# The client's version 0, which transformers 4 wants, has another name for it.
close_session = getattr(huggingface_hub, "close_session", None) or getattr(
    huggingface_hub.utils, "reset_sessions"
)

TOKEN = "hf_not_a_token"
READ_ONLY = "elsewhere"

Answer = tuple[int, dict[str, str], bytes]


class Hub:
    """
    Repositories in memory, served on a port of this machine.

    It answers what loading and uploading SAEs, and loading models and data sets, ask for:
    ``resolve`` (in ranges, too), info, listings, creating a repository, and commits whose
    files come inline. There is one branch. Who sends the token that :func:`running_hub`
    sets is a user who may write everywhere but in the namespace ``READ_ONLY``.

    Attributes:
        repos: Content of each repository's files, by repository and path. The names of
            data sets start with ``datasets/``.
        private: Repositories that were created as private.
        cut: Paths of files of which every download delivers only the first half.
        requests: Method and path of every request so far.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.cut: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), partial(_RequestHandler, self)
        )
        self._thread = Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def put(self, repo: str, folder: Path, sae_id: str = "") -> None:
        """Publish the files of a folder, as ``sae_id`` or at the repository's root."""
        files = self.repos.setdefault(repo, {})
        for path in folder.iterdir():
            if path.is_file():
                files[f"{sae_id}/{path.name}".lstrip("/")] = path.read_bytes()

    def downloads(self) -> list[str]:
        """Names of all files fetched so far, without those only asked about."""
        return [
            path.rsplit("/", 1)[-1]
            for method, path in self.requests
            if method == "GET" and "/resolve/" in path
        ]

    def stop(self) -> None:
        """Stop serving; from then on connections are refused."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, method: str, path: str, body: bytes, token: str) -> Answer:
        self.requests.append((method, path))
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if path == "/api/whoami-v2":
            return _json({"name": "user"}) if token == TOKEN else _error(401)
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        if match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            repo, revision, file = match.groups()
            missing = self._missing(repo, revision)
            return missing or self._file(method, repo, file)
        match = re.fullmatch(
            r"/api/(models|datasets)/(.+?)"
            r"(?:/(revision|tree|preupload|commit)/([^/]+)(?:/(.*))?)?",
            path,
        )
        if not match:
            return _error(404, "NotFound")
        kind, repo, verb, revision, folder = match.groups()
        repo = repo if kind == "models" else f"datasets/{repo}"
        if missing := self._missing(repo, revision or "main"):
            return missing
        match verb:
            case None | "revision":
                return self._info(repo)
            case "tree":
                return self._tree(repo, folder)
        if refused := _refused(repo.split("/")[0], token):
            return refused
        if verb == "preupload":
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            asked = json.loads(body)["files"]
            return _json({"files": [{"path": f["path"], **modes} for f in asked]})
        return self._commit(repo, body)

    def _missing(self, repo: str, revision: str) -> Answer | None:
        if repo not in self.repos:
            return _error(404, "RepoNotFound")
        known = revision in ("main", self._sha(repo))
        return None if known else _error(404, "RevisionNotFound")

    def _sha(self, repo: str) -> str:
        """Hash in place of a commit's, which changes whenever a file does."""
        sha = hashlib.sha1()
        for path, content in sorted(self.repos[repo].items()):
            sha.update(f"{path} {_oid(content)} ".encode())
        return sha.hexdigest()

    def _file(self, method: str, repo: str, path: str) -> Answer:
        commit = {"X-Repo-Commit": self._sha(repo)}
        content = self.repos[repo].get(path)
        if content is None:
            return _error(404, "EntryNotFound", commit)
        etag = {"ETag": f'"{_oid(content)}"', "Accept-Ranges": "bytes"}
        if method == "GET" and path in self.cut:
            content = content[: len(content) // 2]
        return 200, commit | etag, content

    def _info(self, repo: str) -> Answer:
        files = [{"rfilename": path} for path in self.repos[repo]]
        name = repo.removeprefix("datasets/")
        private = repo in self.private
        return _json(
            {"id": name, "sha": self._sha(repo), "siblings": files, "private": private}
        )

    def _tree(self, repo: str, folder: str | None) -> Answer:
        """The entries of a folder, without those of its subfolders."""
        start = f"{folder}/" if folder else ""
        names = {
            path[len(start) :].split("/")[0]
            for path in self.repos[repo]
            if path.startswith(start)
        }
        return _json([self._entry(repo, start + name) for name in sorted(names)])

    def _entry(self, repo: str, path: str) -> dict[str, Any]:
        content = self.repos[repo].get(path)
        if content is None:
            return {"type": "directory", "path": path, "oid": _oid(path.encode())}
        oid = _oid(content)
        return {"type": "file", "path": path, "size": len(content), "oid": oid}

    def _create(self, asked: dict[str, Any], token: str) -> Answer:
        if refused := _refused(asked["organization"], token):
            return refused
        repo = f"{asked['organization']}/{asked['name']}"
        self.repos[repo] = {}
        # "private" of the client's version 0.
        if asked.get("visibility") == "private" or asked.get("private"):
            self.private.add(repo)
        return _json({"url": f"{self.url}/{repo}"})

    def _commit(self, repo: str, body: bytes) -> Answer:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.repos[repo][line["value"]["path"]] = content
        sha = self._sha(repo)
        return _json({"commitUrl": f"{self.url}/{repo}/commit/{sha}", "commitOid": sha})


def _refused(namespace: str, token: str) -> Answer | None:
    """The answer to a wish to write in a namespace, if it is not granted."""
    if token != TOKEN:
        return _error(401)
    return (
        _error(403, text=f"no rights in {namespace}")
        if namespace == READ_ONLY
        else None
    )


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _json(data: Any) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(data).encode()


def _error(
    status: int, code: str = "", headers: dict[str, str] | None = None, text: str = ""
) -> Answer:
    named = {"X-Error-Code": code, "X-Error-Message": text or code}
    return status, named | (headers or {}), b""


class _RequestHandler(BaseHTTPRequestHandler):
    # HTTP/1.0, the default, ends the connection after each answer: a stopped hub
    # does not live on in the client's open connections.

    def __init__(self, hub: Hub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def _respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        status, headers, content = self.hub.answer(self.command, path, body, token)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if status == 200 and self.command == "GET" and wanted:
            start, size = int(wanted[1]), len(content)
            content = content[start : int(wanted[2] or size) + 1]
            end = start + len(content) - 1
            status, headers = (
                206,
                {**headers, "Content-Range": f"bytes {start}-{end}/{size}"},
            )
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_GET = do_POST = _respond

    @override
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def running_hub(cache: Path) -> Iterator[Hub]:
    """
    A hub that this process's ``huggingface_hub`` uses, with an empty cache.

    Processes that are started meanwhile use it, too, with all of the libraries that load
    from a hub.
    """
    hub = Hub()
    constants = huggingface_hub.constants
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # Xet is a protocol and a storage of its own; files come inline here.
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            # The client reads its environment when it is imported. Most of it looks its
            # constants up where they are read here; some modules hold copies.
            before = dict(vars(constants))
            importlib.reload(constants)
            changed = {n: v for n, v in vars(constants).items() if before.get(n) != v}
            for name, module in list(sys.modules.items()):
                if name.startswith("huggingface_hub.") and module is not constants:
                    for constant in changed.keys() & vars(module).keys():
                        if constant.isupper():
                            patch.setattr(module, constant, changed[constant])
            patch.setattr(huggingface_hub.hf_api.api, "endpoint", constants.ENDPOINT)
            # Connections made before may go by way of a proxy.
            close_session()
            yield hub
    finally:
        importlib.reload(constants)
        close_session()
        hub.stop()

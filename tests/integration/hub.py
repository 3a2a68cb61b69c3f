"""Model hub on this machine for the real ``huggingface_hub`` client."""

import base64
import hashlib
import importlib
import json
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

Answer = tuple[int, dict[str, str], bytes]


class Hub:
    """
    Repositories in memory, served on a port of this machine.

    It answers what loading and uploading SAEs asks for: ``resolve``, model info,
    creating a repository, and commits whose files come inline. There is one branch.

    Attributes:
        repos: Content of each repository's files, by repository and path.
        cut: Paths of files of which every download delivers only the first half.
        requests: Method and path of every request so far.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
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

    def put(self, repo: str, folder: Path, sae_id: str) -> None:
        """Publish the files of a folder as ``sae_id``."""
        files = self.repos.setdefault(repo, {})
        for path in folder.iterdir():
            if path.is_file():
                files[f"{sae_id}/{path.name}"] = path.read_bytes()

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

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        self.requests.append((method, path))
        parts = path.strip("/").split("/")
        match method, parts:
            case "HEAD" | "GET", [owner, name, "resolve", "main", *rest]:
                return self._file(method, f"{owner}/{name}", "/".join(rest))
            case "GET", ["api", "models", owner, name]:
                return self._info(f"{owner}/{name}")
            case "POST", ["api", "repos", "create"]:
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}"
                self.repos[repo] = {}
                return _json({"url": f"{self.url}/{repo}"})
            case "POST", ["api", "validate-yaml"]:
                return _json({"errors": [], "warnings": []})
            case "POST", ["api", "models", _, _, "preupload", "main"]:
                modes = {"uploadMode": "regular", "shouldIgnore": False}
                asked = json.loads(body)["files"]
                return _json({"files": [{"path": f["path"], **modes} for f in asked]})
            case "POST", ["api", "models", owner, name, "commit", "main"]:
                return self._commit(f"{owner}/{name}", body)
        return _error(404, "RevisionNotFound" if "resolve" in parts else "NotFound")

    def _sha(self, repo: str) -> str:
        """Hash in place of a commit's, which changes whenever a file does."""
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()

    def _file(self, method: str, repo: str, path: str) -> Answer:
        if repo not in self.repos:
            return _error(404, "RepoNotFound")
        commit = {"X-Repo-Commit": self._sha(repo)}
        content = self.repos[repo].get(path)
        if content is None:
            return _error(404, "EntryNotFound", commit)
        etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if method == "GET" and path in self.cut:
            content = content[: len(content) // 2]
        return 200, commit | etag, content

    def _info(self, repo: str) -> Answer:
        if repo not in self.repos:
            return _error(404, "RepoNotFound")
        files = [{"rfilename": path} for path in self.repos[repo]]
        return _json({"id": repo, "sha": self._sha(repo), "siblings": files})

    def _commit(self, repo: str, body: bytes) -> Answer:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.repos[repo][line["value"]["path"]] = content
        sha = self._sha(repo)
        return _json({"commitUrl": f"{self.url}/{repo}/commit/{sha}", "commitOid": sha})


def _json(data: Any) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(data).encode()


def _error(status: int, code: str, headers: dict[str, str] | None = None) -> Answer:
    named = {"X-Error-Code": code, "X-Error-Message": code}
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
        status, headers, content = self.hub.answer(self.command, path, body)
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
    """A hub that this process's ``huggingface_hub`` uses, with an empty cache."""
    hub = Hub()
    constants = huggingface_hub.constants
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_TOKEN": "hf_not_a_token",
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

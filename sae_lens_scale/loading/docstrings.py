"""
Docstrings: an English corpus that every machine with this package already has.

The docstrings of the standard library and of the installed packages are tens of megabytes of
technical prose, enough to train a small sparse autoencoder on without downloading a data set.
"""

import ast
import gc
import hashlib
import json
import os
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from datasets import Dataset
from tqdm.auto import tqdm

from sae_lens_scale.files import replacing_files
from sae_lens_scale.loading.smollm2 import default_cache_dir

_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "site-packages",
    "test",
    "testing",
    "tests",
}
# Generated files say the same thing over and over. Most say so in a comment at the top; those
# that do not are larger than anything written by hand.
_GENERATED = re.compile(rb"^#.*generated", re.IGNORECASE | re.MULTILINE)
_HEAD_BYTES = 1000
_MAX_FILE_BYTES = 800_000
_TEST_PERCENT = 5
# Share of letters among the visible characters: about 0.95 in prose, 0.75 in code, less in tables.
_MIN_LETTER_SHARE = 0.8

_Function = ast.FunctionDef | ast.AsyncFunctionDef


class _File(NamedTuple):
    """A file to read, with the size and time by which a change is noticed."""

    root: Path
    path: Path
    size: int
    mtime_ns: int


def docstring_corpus(
    split: Literal["train", "test"],
    max_documents: int | None = None,
    *,
    roots: str | Path | Sequence[str | Path] | None = None,
    seed: int = 0,
    min_total_characters: int = 10_000_000,
    min_characters: int = 200,
    max_characters: int = 20_000,
) -> Dataset:
    """
    Build a corpus from the docstrings of the installed Python packages.

    A document is a module (its docstring and those of its functions) or a class (its docstring
    and those of its methods). No docstring is used twice, and text that is mostly code or tables is
    left out. The source is only parsed, never imported. All documents of a file are in the same
    split, so a split depends on which packages are installed, and on nothing else. The files are
    read (for about half a minute) when this is called for the first time, and when one has
    changed: the documents are kept in the cache, which ``SAE_LENS_SCALE_CACHE`` names.

    Args:
        split: ``"train"``, or ``"test"`` for the 5 % of the files that are held out.
        max_documents: Keep this many documents, all by default.
        roots: Folders, or one, to search for Python files, by default those of the standard
            library and of the installed packages.
        seed: Seed of the order of the documents.
        min_total_characters: Fewer characters than this, in both splits together, are an error.
        min_characters: Leave out documents shorter than this.
        max_characters: Split documents longer than this, and cut a docstring that is.

    Returns:
        The documents in shuffled order, in the column ``"text"``.

    Raises:
        ValueError: `split` is neither "train" nor "test", or a number is too small.
        RuntimeError: Too little text was found.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    # A slice up to a negative number would leave out the last ones.
    for name, number in (
        ("max_documents", max_documents),
        ("max_characters", max_characters),
    ):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be positive, got {number}")
    if isinstance(roots, (str, Path)):
        roots = [roots]
    if roots is None:
        roots = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    # The same folder twice (purelib and platlib often are) would be read twice.
    folders = list(dict.fromkeys(Path(root).absolute() for root in roots))
    splits = _read_once(folders, min_characters, max_characters)
    total = sum(len(text) for texts in splits.values() for text in texts)
    if total < min_total_characters or not splits[split]:
        raise RuntimeError(
            f"Found only {total:,} characters of docstrings ({len(splits[split]):,} {split} "
            f"documents) in {', '.join(map(str, folders))}; {min_total_characters:,} are needed. "
            "Install more packages, or use a text data set of your own."
        )
    documents = splits[split]
    random.Random(seed).shuffle(documents)
    return Dataset.from_dict({"text": documents[:max_documents]})


def _read_once(
    folders: list[Path], min_characters: int, max_characters: int
) -> dict[str, list[str]]:
    """Call `_read`, or return its result from the cache if no file has changed since."""
    files = [file for folder in folders for file in _python_files(folder)]
    settings = (min_characters, max_characters)
    cached = default_cache_dir() / f"docstrings-{_digest((folders, settings))}.json"
    # This file and Python's parser decide the documents, beside the files themselves.
    state = _digest((files, Path(__file__).read_bytes(), sys.version_info[:3]))
    # A cache that cannot be read, or written, costs time and nothing else.
    with suppress(OSError, ValueError, LookupError, TypeError):
        kept = json.loads(cached.read_text())
        if kept["state"] == state:
            return kept["splits"]
    splits = _read(files, *settings)
    with suppress(OSError), replacing_files(cached.parent) as temporary:
        kept = json.dumps({"state": state, "splits": splits})
        (temporary / cached.name).write_text(kept)
    return splits


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _read(
    files: list[_File], min_characters: int, max_characters: int
) -> dict[str, list[str]]:
    """Return the documents of each split, in the order of the files."""
    splits: dict[str, list[str]] = {"train": [], "test": []}
    seen: set[str] = set()
    with _no_garbage_collection(), warnings.catch_warnings():
        # The parser warns of each dubious escape in other people's files.
        warnings.simplefilter("ignore")
        for file in tqdm(files, desc="Reading docstrings", unit="file"):
            split = "test" if _is_test(file.path.relative_to(file.root)) else "train"
            splits[split] += [
                document
                for document in _documents(file.path, seen, max_characters)
                if len(document) >= min_characters and _is_prose(document)
            ]
    return splits


def _python_files(root: Path) -> Iterator[_File]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        for name in sorted(names):
            if not name.endswith(".py") or name.startswith("test_"):
                continue
            path = Path(folder, name)
            # Some are broken links.
            with suppress(OSError):
                stat = path.stat()
                if stat.st_size <= _MAX_FILE_BYTES:
                    yield _File(root, path, stat.st_size, stat.st_mtime_ns)


def _documents(path: Path, seen: set[str], max_characters: int) -> Iterator[str]:
    """Yield the documents of a file, of docstrings that are not in `seen`, and add them to it."""
    try:
        source = path.read_bytes()
        if _GENERATED.search(source[:_HEAD_BYTES]):
            return
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    owners: list[ast.Module | ast.ClassDef] = [tree]
    for owner in owners:  # grows as it goes
        owners += [node for node in owner.body if isinstance(node, ast.ClassDef)]
        functions = (node for node in owner.body if isinstance(node, _Function))
        document = ""
        for node in (owner, *functions):
            docstring = ast.get_docstring(node)
            if not docstring or docstring in seen:
                continue
            seen.add(docstring)
            # An escape such as "\\ud800" makes half a character, which no file can hold.
            text = docstring.encode(errors="ignore").decode()[:max_characters]
            if len(document) + len(text) + 2 > max_characters:
                yield document
                document = ""
            document = f"{document}\n\n{text}".strip()
        yield document


def _is_prose(text: str) -> bool:
    visible = "".join(text.split())
    return sum(map(str.isalpha, visible)) >= _MIN_LETTER_SHARE * len(visible)


def _is_test(path: Path) -> bool:
    digest = hashlib.sha256(path.as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < _TEST_PERCENT


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    # Syntax trees have no cycles to collect, but so many nodes that looking for cycles would
    # take a fifth of the time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

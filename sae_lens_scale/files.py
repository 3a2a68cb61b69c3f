"""Files: writing them whole or not at all, and errors that name them."""

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing_files(folder: str | Path) -> Iterator[Path]:
    """
    Make a folder to write into, whose files replace those of another once all are written.

    If anything stops the writing, the other folder keeps the files that it had.

    Args:
        folder: The other folder, which is made if it is missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        yield Path(temporary)
        for file in Path(temporary).iterdir():
            os.replace(file, folder / file.name)


def require_writable(setting: str, folder: str | Path) -> None:
    """
    Refuse a folder that cannot be written into, nor made where it is missing.

    Args:
        setting: What the user calls the setting.
        folder: Its value.

    Raises:
        NotADirectoryError: If it is, or is to be made in, something other than a folder.
        OSError: If nothing can be written there.
    """
    path = Path(folder).absolute()
    # A link to nothing is in the way of a folder, too.
    existing = next(p for p in (path, *path.parents) if p.exists() or p.is_symlink())
    if not existing.is_dir():
        raise NotADirectoryError(f"{setting}: {existing} is no folder")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(
            f"{setting}: nothing can be written into {existing}: {error.strerror}"
        ) from error


def read_json(path: Path) -> Any:
    """
    Read a JSON file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not JSON; the text names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def dump_json(value: Any) -> str:
    """Format a value as strict JSON: NaN and infinity, which are none, become null."""
    return json.dumps(_strict(value), indent=1, allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, text: str) -> None:
    """
    Write a file whole or not at all, in a folder that is made if it is missing.

    It is in UTF-8; what that lacks (bytes of a file's name that are no text) is escaped. A
    device or a pipe stays one.
    """
    content = text.encode(errors="backslashreplace")
    if path.exists() and not path.is_file():
        # Such as /dev/stderr: not to be replaced by a file.
        path.write_bytes(content)
        return
    with replacing_files(path.parent) as folder:
        (folder / path.name).write_bytes(content)

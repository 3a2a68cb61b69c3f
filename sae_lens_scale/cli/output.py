"""Results and errors as the commands print them."""

import argparse
import os
import pickle
import sys
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from sae_lens_scale.files import require_writable

# Errors whose text says enough without their type.
_SELF_EXPLANATORY = (
    argparse.ArgumentError,
    ValueError,
    OSError,
    RuntimeError,
    ImportError,
    SafetensorError,
    pickle.UnpicklingError,
)


def print_result(text: str) -> None:
    """
    Print a command's result; nothing is wrong if its reader has closed the pipe.

    Characters that the terminal's encoding lacks are escaped.

    Raises:
        OSError: If it cannot be written for any other reason.
    """
    try:
        _print(text, sys.stdout)
    except OSError as error:
        # Python flushes once more at exit, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


def require_output(output: Path) -> None:
    """
    Refuse a file, the value of ``--output``, that could not be written.

    Raises:
        OSError: If it is a folder, or nothing can be written in the folder that it is in.
    """
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output: {output.parent} is no folder")
    if output.is_dir():
        raise IsADirectoryError(f"--output: {output} is a folder")
    if not output.exists() or output.is_file():
        # It is replaced by a new one.
        require_writable("--output", output.parent)


def complain(text: str) -> None:
    """Print an error in one line."""
    _print(f"sae-lens-scale: error: {text}", sys.stderr)


def note(text: str) -> None:
    """
    Print what a reader of the terminal wants to know, beside the result; of several
    processes that torchrun has started, the first one does.
    """
    if os.environ.get("RANK", "0") == "0":
        _print(f"sae-lens-scale: {text}", sys.stderr)


def _print(text: str, stream: TextIO | None) -> None:
    # Python has none where its caller closed it.
    if stream is None:
        return
    encoding = stream.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    print(text, file=stream, flush=True)  # noqa: T201


def error_text(error: BaseException) -> str:
    """Return an error's text in one line, after its type where that is needed."""
    text = " ".join(str(error).split())
    if text and isinstance(error, _SELF_EXPLANATORY):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def table(*columns: dict[str, Any]) -> str:
    """
    Format values by name as a text table, a row for each name.

    Args:
        columns: The values of each column, by the same names in each; a dictionary is a
            group of values.
    """
    flat = [_flatten(values) for values in columns]
    rows = [(name, *(_cell(values[name]) for values in flat)) for name in flat[0]]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _flatten(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": entry for key, entry in value.items()}
        else:
            flat[name] = value
    return flat


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)

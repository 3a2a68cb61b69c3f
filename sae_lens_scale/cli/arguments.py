"""Types of the commands' arguments, for argparse."""

import argparse
from pathlib import Path


def positive(text: str) -> int:
    """
    Read a positive integer.

    Raises:
        ArgumentTypeError: If it is none.
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def filled(text: str) -> str:
    """
    Take a text as it is, unless it is empty, as a variable that the shell does not know.

    Raises:
        ArgumentTypeError: If it is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def path(text: str) -> Path:
    """
    Read a path. An empty one would stand for the current folder.

    Raises:
        ArgumentTypeError: If it is empty.
    """
    return Path(filled(text))

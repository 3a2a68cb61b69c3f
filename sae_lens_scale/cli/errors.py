"""What the command line says of an error."""

import argparse
import pickle

from safetensors import SafetensorError

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


def error_text(error: BaseException) -> str:
    """
    An error in one line.

    Args:
        error: What was raised.

    Returns:
        Its own text, after its type where that is needed to understand it.
    """
    text = " ".join(str(error).split())
    if text and isinstance(error, _SELF_EXPLANATORY):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

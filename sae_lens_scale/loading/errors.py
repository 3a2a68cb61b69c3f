"""Errors that name the setting whose model or text could not be loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten

import torch
from datasets import load_dataset

# Those that SAELens's store reads.
_COLUMNS = ("text", "tokens", "input_ids", "problem")
_MODELS = (
    "name a model that TransformerLens knows or, with the model class "
    "AutoModelForCausalLM, a folder or a model of the hub"
)
_TEXTS = f"name a data set of the hub, or its folder, with a column {_COLUMNS[0]!r}"


@contextmanager
def naming_model(setting: str, name: str) -> Iterator[None]:
    """
    Turn any error within into one that says which model could not be loaded.

    A missing package and a lack of memory, which no other name would mend, pass as they are.

    Args:
        setting: What the user calls the setting, such as ``--model``.
        name: Its value.

    Raises:
        ValueError: Instead of the error.
    """
    with _naming(setting, name, _MODELS):
        yield


@contextmanager
def naming_text(setting: str, name: str) -> Iterator[None]:
    """Turn any error within into one that says which text; as :func:`naming_model`."""
    with _naming(setting, name, _TEXTS):
        yield


def require_text(setting: str, name: str) -> None:
    """
    Refuse a data set that is missing, or has no column that SAELens reads.

    Args:
        setting: What the user calls the setting.
        name: Name on the hub, or folder.

    Raises:
        ValueError: If it cannot be read.
    """
    with naming_text(setting, name):
        row = next(iter(load_dataset(name, split="train", streaming=True)), {})
        if not set(_COLUMNS) & set(row):
            columns = ", ".join(_COLUMNS)
            raise ValueError(f"of the columns {columns} it has none, but {sorted(row)}")


@contextmanager
def _naming(setting: str, name: str, advice: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        # The name is right: a package is missing, or memory.
        raise
    except Exception as error:
        # Some list thousands of models.
        reason = shorten(str(error), 200, placeholder=" …") or type(error).__name__
        raise ValueError(
            f"{setting} {name} cannot be loaded: {reason}; {advice}"
        ) from error

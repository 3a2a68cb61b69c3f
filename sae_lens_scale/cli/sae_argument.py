"""The arguments of ``evaluate`` and ``info`` that name an SAE."""

import argparse
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE

from .output import error_text


def add_sae(parser: argparse.ArgumentParser) -> None:
    """Add the arguments to a command's parser."""
    parser.add_argument(
        "sae", help="folder on disk, release of SAELens or repository on the hub"
    )
    parser.add_argument(
        "sae_id", nargs="?", help="the SAE in the release or repository"
    )


def load_sae(options: argparse.Namespace, device: str, dtype: str | None) -> SAE[Any]:
    """
    Load the SAE that the arguments name, as it was saved.

    Args:
        options: The parsed options.
        device: Device of the SAE.
        dtype: Type of its weights; None for its own on disk, float32 from the hub.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the folder holds no SAE that can be loaded.
    """
    # SAELens's own message for a device that is not there is about pinned memory.
    torch.empty(0, device=device)
    folder = Path(options.sae)
    if options.sae_id is not None:
        given: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        return SAE.from_pretrained(options.sae, options.sae_id, device=device, **given)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{options.sae} is no folder; of a release or repository, name the SAE too"
        )
    try:
        return SAE.load_from_disk(folder, device=device, dtype=dtype)
    except Exception as error:
        # Few of these name the file.
        raise ValueError(f"{folder} cannot be loaded: {error_text(error)}") from error

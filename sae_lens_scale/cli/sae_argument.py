"""SAEs named on the command line."""

import argparse
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.training.activation_scaler import ActivationScaler

from sae_lens_scale.loading.errors import is_of_the_machine, require_device
from sae_lens_scale.run_settings import ESTIMATED_NORMALIZATIONS

from .arguments import filled
from .output import error_text


def add_sae(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name one SAE, as :func:`load_sae` takes it."""
    parser.add_argument(
        "sae",
        type=filled,
        help="folder on disk, release of SAELens or repository on the hub",
    )
    parser.add_argument(
        "sae_id", type=filled, nargs="?", help="the SAE in the release or repository"
    )


def find_saes(names: Sequence[str]) -> Sequence[tuple[str, str | None]]:
    """
    Find the SAEs that the arguments of a command name.

    Args:
        names: Folders on disk; or a release of SAELens and an SAE of it, each a name or a
            regular expression that matches whole names; or a repository on the hub and
            an SAE in it.

    Returns:
        Folder, release or repository of each, with its id in the last two.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If a regular expression is none.
    """
    releases = get_pretrained_saes_directory()
    if _are_folders(names, releases):
        for name in names:
            _require_folder(name)
        return [(name, None) for name in names]
    release, sae_id = names
    # Names of releases have no slash, those of repositories do.
    if "/" in release or (release in releases and sae_id in releases[release].saes_map):
        return [(release, sae_id)]
    for pattern in names:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{pattern} is no release or SAE, nor a regular expression: {error}"
            ) from error
    matches = [
        (name, one)
        for name, lookup in releases.items()
        if re.fullmatch(release, name)
        for one in lookup.saes_map
        if re.fullmatch(sae_id, one)
    ]
    # SAELens says what there is instead of a name that matches nothing.
    return matches or [(release, sae_id)]


def load_sae(name: str, sae_id: str | None, device: str, dtype: str | None) -> SAE[Any]:
    """
    Load an SAE as it was saved.

    Errors of the machine (:func:`.is_of_the_machine`) pass as they are.

    Args:
        name: Folder on disk, release or repository.
        sae_id: The SAE in the release or repository.
        device: Device of the SAE.
        dtype: Type of its weights; None for its own on disk, float32 from the hub.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it cannot be loaded, or the device not be used.
    """
    if sae_id is None:
        _require_folder(name)
    # SAELens's own message for a device that is not there is about pinned memory.
    require_device("--device", device)
    try:
        if sae_id is None:
            return SAE.load_from_disk(name, device=device, dtype=dtype)
        given: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        return SAE.from_pretrained(name, sae_id, device=device, **given)
    except Exception as error:
        if is_of_the_machine(error):
            raise
        # Few of these say which.
        whole = name if sae_id is None else f"{name} {sae_id}"
        raise ValueError(f"{whole} cannot be loaded: {error_text(error)}") from error


def fold_scaler(sae: SAE[Any], folder: str) -> None:
    """
    Make a training checkpoint's SAE take raw activations, as exports do.

    Args:
        sae: The SAE, which may be an export's.
        folder: Where it was loaded from.

    Raises:
        ValueError: If the folder does not say how the trainer had scaled activations.
    """
    if sae.cfg.normalize_activations not in ESTIMATED_NORMALIZATIONS:
        return
    path = Path(folder, ACTIVATION_SCALER_CFG_FILENAME)
    scaler = ActivationScaler()
    if path.exists():
        scaler.load(path)
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if scaler.whitening is not None:
        sae.fold_activation_whitening(
            scaler.whitening.mean,
            scaler.whitening.matrix,
            scaler.whitening.inverse_matrix,
        )
    # Each fold sets it to "none".
    if sae.cfg.normalize_activations in ESTIMATED_NORMALIZATIONS:
        raise ValueError(
            f"{path} is missing or incomplete: it does not say how activations were "
            f"scaled (normalize_activations={sae.cfg.normalize_activations!r})"
        )


def _are_folders(names: Sequence[str], releases: Container[str]) -> bool:
    """Tell folders, of which some may be mistyped, from a release or repository and an SAE."""
    if len(names) != 2 or Path(names[0]).is_dir():
        return True
    # The second says less: an SAE on the hub has by default the name of the folder that it
    # was uploaded from.
    mistyped = names[0] not in releases and Path(names[0]).parent.is_dir()
    return mistyped and Path(names[1]).is_dir()


def _require_folder(name: str) -> None:
    if not Path(name).is_dir():
        raise FileNotFoundError(
            f"{name} is no folder; of a release or repository, name the SAE too"
        )

"""
Files of the authors' code: finding, reading and checking them.

Their formats are described in :mod:`sae_lens_scale.loading.authors`.
"""

import json
from pathlib import Path, PurePath
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file

WEIGHTS_SUFFIXES = (".pt", ".safetensors")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Axes of each tensor: input (d), latent (M), latent of one expert (n), expert (N).
_SWITCH_AXES = {
    "b_dec": "d",
    "b_router": "d",
    "router.weight": "Nd",
    "encoder.weight": "Md",
    "decoder": "Md",
}
_MIXTURE_AXES = {"b_dec": "d", "b_gate": "d", "gate.bias": "N", "gate.weight": "Nd"}
_EXPERT_AXES = {"encoder.weight": "nd", "encoder.bias": "n", "decoder": "nd"}
_SCALE_AXES = {
    "omega": "N",
    "beta": "N",
    "lp_transform_encoder.weight": "dd",
    "lp_transform_decoder.weight": "dd",
}

T_PATH = TypeVar("T_PATH", bound=PurePath)


def find_weights(path: Path) -> Path:
    """The file itself, or the only checkpoint in a folder."""
    if not path.is_dir():
        return path
    files = [f for f in sorted(path.iterdir()) if f.suffix in WEIGHTS_SUFFIXES]
    files = [f for f in files if f.stem == "ae"] or files
    if len(files) != 1:
        raise ValueError(
            f"path must be a checkpoint, or a folder with ae.pt or only one checkpoint "
            f"in it, got {path} with {[f.name for f in files]}"
        )
    return files[0]


def config_paths(weights: T_PATH) -> list[T_PATH]:
    """Where the authors' training code leaves the config.json of such a file."""
    folders = [weights.parent]
    if weights.parent.name == "checkpoints":
        folders.append(weights.parent.parent)
    return [folder / "config.json" for folder in folders]


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a file, without running anything that a pickle may hold."""
    # Opened first, so that a file that is missing or not readable is called that.
    with path.open("rb") as file:
        try:
            if path.suffix == ".safetensors":
                return load_file(path)
            # A pickle may run any code; this reads tensors and containers only.
            state = torch.load(file, map_location="cpu", weights_only=True)
        # What is no pickle at all ends as any error: KeyError, say.
        except Exception as error:
            raise ValueError(
                f"{path} is damaged, or holds more than tensors, and was not loaded"
            ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a state dict, got {type(state).__name__}")
    return state


def check_tensors(state: dict[str, Any], path: Path) -> dict[str, int]:
    """Check that a state dict has one of the formats, and return the sizes of its axes."""
    sizes: dict[str, int] = {}
    if "router.weight" in state:
        axes = _SWITCH_AXES
    elif "gate.weight" in state:
        experts = {str(name).split(".")[1] for name in state if _is_of_expert(name)}
        sizes["N"] = len(experts)
        axes = {
            **_MIXTURE_AXES,
            **(_SCALE_AXES if "omega" in state else {}),
            **{
                f"expert_modules.{i}.{name}": value
                for i in range(len(experts))
                for name, value in _EXPERT_AXES.items()
            },
        }
    else:
        raise ValueError(
            f"{path} is no checkpoint of the authors' code: it has neither router.weight "
            f"nor gate.weight, but {_some(list(state))}"
        )
    missing = [name for name in axes if name not in state]
    unknown = [name for name in state if name not in axes]
    if missing or unknown:
        raise ValueError(
            f"{path} is none of the formats of the authors' code: missing: "
            f"{_some(missing)}; unknown: {_some(unknown)}"
        )
    for name, letters in axes.items():
        tensor = state[name]
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in _DTYPES:
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise ValueError(f"{name} in {path} must be one of {_DTYPES}, got {kind}")
        shape = list(tensor.shape)
        if len(shape) != len(letters) or any(
            size == 0 or sizes.get(letter, size) != size
            for letter, size in zip(letters, shape, strict=True)
        ):
            wanted = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
            raise ValueError(
                f"{name} in {path} must have shape [{wanted}], got {shape}"
            )
        sizes.update(zip(letters, shape, strict=True))
        if not tensor.isfinite().all():
            raise ValueError(f"{name} in {path} must be finite, got NaN or infinity")
    if "n" in sizes:
        sizes["M"] = sizes["N"] * sizes["n"]
    if "omega" in state:
        _check_version(state, path)
    return sizes


def _is_of_expert(name: Any) -> bool:
    return str(name).startswith("expert_modules.")


def _some(names: list[Any]) -> str:
    return (
        ", ".join(map(str, names[:4])) + (", ..." if len(names) > 4 else "") or "none"
    )


def _check_version(state: dict[str, torch.Tensor], path: Path) -> None:
    """
    Refuse Scale SAEs of versions of the authors' code that compute something else.

    Their parameters have the same names, but which of them training moved away from
    where they start (0, and the identity) tells the versions apart.
    """

    def is_identity(name: str) -> bool:
        return torch.equal(state[name], torch.eye(len(state[name])).to(state[name]))

    omega = state["omega"]
    reason = None
    if state["beta"].any() or not is_identity("lp_transform_decoder.weight"):
        reason = (
            "beta or lp_transform_decoder.weight was trained, so that it is of one "
            "that scales decoders, too"
        )
    elif not omega.any() and not is_identity("lp_transform_encoder.weight"):
        reason = (
            "lp_transform_encoder.weight was trained and omega was not, so that it is "
            "of one that removes low-pass parts"
        )
    elif omega[0] and len(omega) > 1 and not omega[1:].any():
        reason = (
            "only the first omega was trained, so that it is of one that applies it to "
            "all experts"
        )
    if reason:
        raise ValueError(
            f"{path} is of a version of the authors' code that computes something other "
            f"than the published Scale SAE: {reason}"
        )


def read_config(path: Path) -> dict[str, Any]:
    """A config.json; empty if it holds no object."""
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return config if isinstance(config, dict) else {}

"""Checks of an SAE's tensors, in memory and in its file."""

from collections.abc import Mapping
from typing import Any

import torch

from .config import MixtureSAEConfig

# Fields of the config that are sizes of a tensor, in the order of its dimensions. What the
# decoder reconstructs may have another width than d_in.
_SIZES = {
    "W_enc": ("d_in", "d_sae"),
    "b_enc": ("d_sae",),
    "W_dec": ("d_sae",),
    "W_router": ("d_in", "num_experts"),
    "b_router": ("d_in",),
    "omega": ("num_experts",),
    "W_low_pass": ("d_in", "d_in"),
}


def require_sizes(cfg: MixtureSAEConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Check that tensors have the sizes of a config.

    Args:
        cfg: The config.
        tensors: Parameters of an SAE, or some of them, by name; others are not checked.

    Raises:
        ValueError: If one does not; names it and the config's field.
    """
    for name, tensor in tensors.items():
        for size, field in zip(tensor.shape, _SIZES.get(name, ()), strict=False):
            if size != getattr(cfg, field):
                raise ValueError(
                    f"{name} of shape {tuple(tensor.shape)} does not fit the config's "
                    f"{field}={getattr(cfg, field)}"
                )


def require_tensors(
    cfg: MixtureSAEConfig,
    state_dict: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """
    Check that a file's tensors are those of an SAE.

    Args:
        cfg: The SAE's config, for the message.
        state_dict: Tensors of the file.
        shapes: The shape of each tensor that it must hold.

    Raises:
        ValueError: If tensors are missing, unknown, of another shape or not of floating
            point; the message names all of them.
    """
    problems = [f"{name} is missing" for name in shapes if name not in state_dict]
    for name, tensor in state_dict.items():
        if name not in shapes:
            problems.append(f"{name} is not part of it")
        elif tuple(tensor.shape) != shapes[name]:
            problems.append(
                f"{name} must have shape {shapes[name]}, got {tuple(tensor.shape)}"
            )
        elif not tensor.is_floating_point():
            problems.append(f"{name} must be of floating point, got {tensor.dtype}")
    if problems:
        raise ValueError(
            f"these are not the weights of a {cfg.architecture()!r} SAE with "
            f"d_in={cfg.d_in}, d_sae={cfg.d_sae} and "
            f"num_experts={cfg.num_experts}: {'; '.join(problems)}"
        )

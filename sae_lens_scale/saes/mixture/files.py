"""Checks of the tensors in an SAE's file."""

from typing import Any

from .config import MixtureSAEConfig


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

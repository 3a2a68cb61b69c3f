"""Base class of the foreign checkpoint formats."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from sae_lens import SAEConfig

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class CheckpointFormat(ABC):
    """
    Format of a state dict that other code wrote.

    Attributes:
        name: The SAE and its authors, for messages and help.
        marks: Names of the tensors by which a state dict of this format is recognised.
        axes: The axes of each tensor, by its name: input (d), latent (M), latent of one
            expert (n), expert (N). A name with "{i}" stands for one tensor of each expert.
        experts_per_token: Number of experts that each token selects in every SAE of this
            format; None if it is a setting.
    """

    name: str
    marks: frozenset[str]
    axes: dict[str, str]
    experts_per_token: int | None = None

    @abstractmethod
    def config(
        self, fields: dict[str, Any], experts_per_token: int, heaviside: bool
    ) -> SAEConfig:
        """
        Make the config of an inference SAE.

        Args:
            fields: Fields that SAEs of all formats have.
            experts_per_token: Number of experts that each token selects.
            heaviside: True if the gates are 1.
        """

    @abstractmethod
    def tensors(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Convert a checked state dict to the inference SAE's tensors, by its own names.

        Raises:
            ValueError: If the SAE cannot compute the same as the checkpoint.
        """

    def metadata(self, state: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return entries for the SAE's metadata, which the converted tensors do not show."""
        return {}

    def check(self, state: dict[str, Any]) -> dict[str, int]:
        """
        Check that a state dict has this format, and return the sizes of the axes.

        Raises:
            ValueError: If a tensor is missing, unknown, not dense, not of floating point,
                not finite or of another shape.
        """
        sizes: dict[str, int] = {}
        prefixes = tuple({n.partition("{i}")[0] for n in self.axes if "{i}" in n})
        if prefixes:
            of_experts = [str(name) for name in state if str(name).startswith(prefixes)]
            sizes["N"] = len({name.split(".")[1] for name in of_experts})
        axes = {
            name.format(i=i): letters
            for name, letters in self.axes.items()
            for i in range(sizes["N"] if "{i}" in name else 1)
        }
        missing = [name for name in axes if name not in state]
        unknown = [name for name in state if name not in axes]
        if missing or unknown:
            raise ValueError(
                f"not the tensors of a {self.name}: missing: {listed(missing)}; "
                f"unknown: {listed(unknown)}"
            )
        for name, letters in axes.items():
            _check_tensor(name, state[name], letters, sizes)
        if "n" in sizes:
            sizes["M"] = sizes["N"] * sizes["n"]
        return sizes


def _check_tensor(name: str, tensor: Any, letters: str, sizes: dict[str, int]) -> None:
    """Check a tensor against the sizes of axes that are known, and add its own to them."""
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in _DTYPES:
        kind = getattr(tensor, "dtype", type(tensor).__name__)
        raise ValueError(f"{name} must be one of {_DTYPES}, got {kind}")
    # Sparse ones, and those on the meta device, hold no numbers that could be read.
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = tensor.device if tensor.is_meta else tensor.layout
        raise ValueError(f"{name} must be a dense tensor, got {kind}")
    shape = list(tensor.shape)
    if len(shape) != len(letters) or any(
        size == 0 or sizes.get(letter, size) != size
        for letter, size in zip(letters, shape, strict=True)
    ):
        wanted = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
        raise ValueError(f"{name} must have shape [{wanted}], got {shape}")
    sizes.update(zip(letters, shape, strict=True))
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def listed(names: Iterable[Any]) -> str:
    """The first four of some names, for a message."""
    names = list(map(str, names))
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") or "none"

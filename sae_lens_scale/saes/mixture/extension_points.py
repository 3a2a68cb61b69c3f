"""SAELens's extension points on an SAE: hooks, methods that are overridden, activation_fn."""

from typing import Any

import torch
from sae_lens.saes.sae import SAE
from sae_lens.saes.topk_sae import TopK
from torch import nn

from .config import MixtureSAEConfig


def is_hooked(hook: nn.Module) -> bool:
    """Say whether anybody watches or edits the tensors that pass a hook point."""
    return bool(
        hook._forward_hooks
        or hook._forward_pre_hooks
        or hook._backward_hooks
        or hook._backward_pre_hooks
        # nnsight and accelerate register no hook: they put another forward on the module.
        or "forward" in vars(hook)
    )


def pass_copy(hook: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """
    Pass a tensor that derivatives need through a hook point.

    Args:
        hook: The hook point.
        tensor: The tensor; of any shape.

    Returns:
        What the hook point returns. Who hooks it sees a copy, and may edit it in place.
    """
    return hook(tensor.clone() if is_hooked(hook) else tensor)


def is_overridden(sae: SAE[Any], *names: str) -> bool:
    """Say whether a subclass, or an attribute of the SAE, replaces one of these methods."""
    return any(name in vars(sae) or _is_replaced(type(sae), name) for name in names)


def _is_replaced(cls: type, name: str) -> bool:
    owner = next(c for c in cls.__mro__ if name in vars(c))
    # Of both: functools.wraps copies a function's module, and patches leave its class.
    modules = (owner.__module__, vars(owner)[name].__module__)
    return any(module.rpartition(".")[0] != __package__ for module in modules)


class ConfigTopK(TopK):
    """
    SAELens's TopK with the k of an SAE's config, whichever of the two is changed.

    Args:
        cfg: The config.
    """

    def __init__(self, cfg: MixtureSAEConfig):
        self._cfg = cfg
        super().__init__(cfg.k)

    @property
    def k(self) -> int:  # type: ignore[override]
        return self._cfg.k

    @k.setter
    def k(self, k: int) -> None:
        self._cfg.k = k

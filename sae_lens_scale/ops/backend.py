"""Choice of the backend that computes a product."""

import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch

from . import torch_backend


def backend_for(*tensors: torch.Tensor) -> ModuleType:
    """
    Choose, for each call, by device and dtype.

    Both backends have the functions ``sampled_products``, ``latent_sums``,
    ``grouped_encode``, ``grouped_decode`` and ``grouped_sums``, which know nothing of
    autograd; their two factors have one dtype, which is the result's.

    Args:
        tensors: Everything that is read and written; float tensors.

    Returns:
        :mod:`.triton_backend` where it supports all of them (on NVIDIA GPUs, or with
        TRITON_INTERPRET=1), :mod:`.torch_backend` elsewhere.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if (tensors[0].is_cuda or interpreted) and _has_triton():
        from . import triton_backend

        if all(map(triton_backend.supports, tensors)):
            return triton_backend
    return torch_backend


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None

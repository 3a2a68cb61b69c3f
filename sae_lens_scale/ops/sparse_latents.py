"""Feature activations of the latents that survive, compactly."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int

from .autograd import opaque_to_compiler, vmap_by_loop
from .buffers import zeros


class SparseLatents(NamedTuple):
    """
    Latents that survive the selection: at most ``k`` per token.

    Attributes:
        values: Feature activations, after ReLU and gate. Shape ``[..., k]``.
        indices: Their latents, in ``range(d_sae)``. Shape ``[..., k]``, int64.
    """

    values: Float[torch.Tensor, "*batch k"]
    indices: Int[torch.Tensor, "*batch k"]

    def to_dense(self, d_sae: int) -> Float[torch.Tensor, "*batch d_sae"]:
        """The same activations ``[..., d_sae]``, zero elsewhere; differentiable."""
        return _to_dense(self.values, self.indices, d_sae)

    def to_coo(self, d_sae: int) -> torch.Tensor:
        """The same activations as a sparse COO tensor ``[..., d_sae]``."""
        # unravel_index would copy the shape to the device, and wait.
        sizes, device = self.values.shape, self.values.device
        places = torch.meshgrid(
            *(torch.arange(size, device=device) for size in sizes), indexing="ij"
        )
        positions = [place.flatten() for place in places[:-1]]
        return torch.sparse_coo_tensor(
            torch.stack([*positions, self.indices.flatten()]),
            self.values.flatten(),
            (*sizes[:-1], d_sae),
            check_invariants=False,
        )


class _ToDense(torch.autograd.Function):
    """See :meth:`SparseLatents.to_dense`; linear in the values."""

    @staticmethod
    def forward(
        values: torch.Tensor, indices: torch.Tensor, d_sae: int
    ) -> torch.Tensor:
        dense = zeros((*values.shape[:-1], d_sae), values)
        return dense.scatter_add_(-1, indices, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Any) -> None:
        _, indices, ctx.d_sae = inputs
        ctx.save_for_backward(indices)
        ctx.save_for_forward(indices)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return grads[0].gather(-1, ctx.saved_tensors[0]), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        return _ToDense.apply(tangents[0], ctx.saved_tensors[0], ctx.d_sae)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return torch.stack(vmap_by_loop(_ToDense, info, in_dims, inputs)), 0


_to_dense = opaque_to_compiler(_ToDense)

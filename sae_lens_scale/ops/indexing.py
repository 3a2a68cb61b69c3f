"""Indexing of weights by latent or expert, with well-behaved gradients."""

from typing import Any

import torch
from jaxtyping import Int

from .autograd import opaque_to_compiler
from .buffers import BufferPool


class _IndexSelect(torch.autograd.Function):
    @staticmethod
    def forward(
        weights: torch.Tensor, dim: int, latents: torch.Tensor, *_: Any
    ) -> torch.Tensor:
        return weights.index_select(dim, latents)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Any) -> None:
        weights, ctx.dim, latents, ctx.pool = inputs
        ctx.shape = weights.shape
        ctx.save_for_backward(latents)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (latents,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A graph of this gradient is being built: nothing may change in place.
            zeros = grads[0].new_zeros(ctx.shape)
            return zeros.index_add(ctx.dim, latents, grads[0]), None, None, None
        gradient = ctx.pool.take(ctx.shape, grads[0]).zero_()
        return gradient.index_add_(ctx.dim, latents, grads[0]), None, None, None


_index_select = opaque_to_compiler(_IndexSelect)


def index_select(
    weights: torch.Tensor,
    dim: int,
    latents: Int[torch.Tensor, " n"],
    pool: BufferPool,
) -> torch.Tensor:
    """
    ``weights.index_select(dim, latents)``, with a gradient in memory that is reused.

    Args:
        weights: One row or column for each latent.
        dim: The dimension that counts the latents.
        latents: Latents to select, ``[n]``.
        pool: Memory for the gradient, which is as large as the weights.

    Returns:
        A copy of the selected rows or columns.
    """
    return _index_select(weights, dim, latents, pool)


def lookup(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """
    ``table[indices]``, with a gradient that is the same in every run.

    The gradient of plain indexing is summed by all threads at once, and in bfloat16 if
    the table is.

    Args:
        table: One number or row for each item, ``[items, ...]``.
        indices: Items, of any shape.

    Returns:
        In the shape of ``indices``, with the dimensions of a row at the end.
    """
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    found = wide.index_select(0, indices.flatten())
    return found.view(*indices.shape, *table.shape[1:]).to(table.dtype)

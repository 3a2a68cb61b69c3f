"""Selecting what belongs to some latents or experts, with well-behaved gradients."""

from typing import Any

import torch
from jaxtyping import Int

from .autograd import eagerly
from .buffers import BufferPool


class _SelectLatents(torch.autograd.Function):
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
            # Somebody derives this gradient, maybe of a batch of gradients.
            zeros = grads[0].new_zeros(ctx.shape)
            return zeros.index_add(ctx.dim, latents, grads[0]), None, None, None
        gradient = ctx.pool.take(ctx.shape, grads[0]).zero_()
        return gradient.index_add_(ctx.dim, latents, grads[0]), None, None, None


_select_latents = eagerly(_SelectLatents)


def select_latents(
    weights: torch.Tensor,
    dim: int,
    latents: Int[torch.Tensor, " n"],
    pool: BufferPool,
) -> torch.Tensor:
    """
    Weights of some latents; ``weights.index_select(dim, latents)``.

    Args:
        weights: One row or column for each latent.
        dim: Which dimension counts the latents.
        latents: Those to select.
        pool: Memory for the gradient, which is as large as the weights.

    Returns:
        A copy of the selected rows or columns.
    """
    return _select_latents(weights, dim, latents, pool)


def take(per_item: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """
    ``per_item[indices]``, with a gradient that is the same in every run.

    That of indexing is summed by all threads at once, and in bfloat16 if parameters are.

    Args:
        per_item: One number or row for each item.
        indices: Items, of any shape.

    Returns:
        In the shape of ``indices``, with the dimensions of a row at the end.
    """
    wide = per_item.to(torch.promote_types(per_item.dtype, torch.float32))
    taken = wide.index_select(0, indices.flatten())
    return taken.view(*indices.shape, *per_item.shape[1:]).to(per_item.dtype)

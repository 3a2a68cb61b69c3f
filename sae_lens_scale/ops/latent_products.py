"""
Products over the latents that each token selected, and over no others.

Three products of tokens' ``values`` ``[tokens, k]``, dense ``rows`` ``[tokens, width]``
and per-latent ``weights`` ``[num_latents, width]``, each linear in both of its factors:

- :func:`sparse_decode`, ``out[t] = sum_i values[t, i] weights[indices[t, i]]``;
- :func:`sampled_products`, ``out[t, i] = rows[t] . weights[indices[t, i]]``;
- :func:`latent_sums`, ``out[j] = sum of values[t, i] rows[t] over all indices[t, i] = j``.

They are each other's derivatives, to any order and in forward mode too: the gradient of
one in one of its factors is another one. So an SAE whose TopK keeps k latents needs no
``[tokens, d_sae]`` tensor, forward or backward.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int

from . import kernels
from .buffers import BufferPool


class LatentSelection(NamedTuple):
    """
    Which latents each token selected.

    Attributes:
        indices: The latents, in ``range(num_latents)``; ``[tokens, k]``, int64.
        num_latents: How many there are to select from.
        order: ``indices`` flattened and sorted by latent, as positions in the unsorted;
            ``[tokens * k]``. Sorted when needed if None; see :meth:`sorted_by_latent`.
        pool: Memory for results of :func:`latent_sums`, which are gradients most of the
            time; fresh memory if None.
    """

    indices: Int[torch.Tensor, "tokens k"]
    num_latents: int
    order: Int[torch.Tensor, " tokens_k"] | None = None
    pool: BufferPool | None = None

    def sorted_by_latent(self) -> "LatentSelection":
        """The same selection with ``order``: one sort for all the products that follow."""
        return self._replace(order=self.indices.flatten().argsort(stable=True))


def one_by_one(
    function: type[torch.autograd.Function],
    info: Any,
    in_dims: tuple[int | None, ...],
    inputs: tuple[Any, ...],
) -> list[Any]:
    """Apply a function to each member of the batch that torch.vmap makes of inputs."""
    return [
        function.apply(
            *(
                value if dim is None else value.select(dim, i)
                for value, dim in zip(inputs, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]


class _Product(torch.autograd.Function):
    """One of the three products; ``known`` is its result, where that is known already."""

    @staticmethod
    def forward(
        product: Callable[..., torch.Tensor],
        a: torch.Tensor,
        b: torch.Tensor,
        indices: torch.Tensor,
        num_latents: int,
        order: torch.Tensor | None,
        pool: BufferPool | None,
        known: torch.Tensor | None,
    ) -> torch.Tensor:
        if known is not None:
            return known.clone()
        selection = LatentSelection(indices, num_latents, order, pool)
        return _COMPUTE[product](a, b, selection)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.product, a, b, indices, ctx.num_latents, order, ctx.pool, _ = inputs
        ctx.save_for_backward(a, b, indices, order)
        ctx.save_for_forward(a, b, indices, order)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a, b, indices, order = ctx.saved_tensors
        selection = LatentSelection(indices, ctx.num_latents, order, ctx.pool)
        (grad,) = grads
        grad_a = grad_b = None
        if ctx.needs_input_grad[1]:
            grad_a = _GRADIENT_IN_A[ctx.product](grad, a, b, selection)
        if ctx.needs_input_grad[2]:
            grad_b = _GRADIENT_IN_B[ctx.product](grad, a, b, selection)
        return None, grad_a, grad_b, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        a, b, indices, order = ctx.saved_tensors
        selection = LatentSelection(indices, ctx.num_latents, order, ctx.pool)
        terms = []
        if tangents[1] is not None:
            terms.append(ctx.product(tangents[1], b, selection))
        if tangents[2] is not None:
            terms.append(ctx.product(a, tangents[2], selection))
        return torch.stack(terms).sum(dim=0)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return torch.stack(one_by_one(_Product, info, in_dims, inputs)), 0


def _apply(
    product: Callable[..., torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    selection: LatentSelection,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    indices, num_latents, order, pool = selection
    return _Product.apply(product, a, b, indices, num_latents, order, pool, known)


def sparse_decode(
    values: Float[torch.Tensor, "tokens k"],
    weights: Float[torch.Tensor, "num_latents width"],
    selection: LatentSelection,
) -> Float[torch.Tensor, "tokens width"]:
    """
    Sum the rows of each token's latents, weighted by its values.

    Args:
        values: Activations of the selected latents, ``[tokens, k]``.
        weights: One row for each latent, ``[num_latents, width]``; the decoder, say.
        selection: The latents of each token.

    Returns:
        ``[tokens, width]``.
    """
    return _apply(sparse_decode, values, weights, selection)


def sampled_products(
    rows: Float[torch.Tensor, "tokens width"],
    weights: Float[torch.Tensor, "num_latents width"],
    selection: LatentSelection,
    known: Float[torch.Tensor, "tokens k"] | None = None,
) -> Float[torch.Tensor, "tokens k"]:
    """
    Dot products of each token's row with the rows of its latents.

    Args:
        rows: One row for each token, ``[tokens, width]``.
        weights: One row for each latent, ``[num_latents, width]``; an encoder
            transposed, say.
        selection: The latents of each token.
        known: The result, if it is known already; then only derivatives are computed.

    Returns:
        ``[tokens, k]``.
    """
    return _apply(sampled_products, rows, weights, selection, known)


def latent_sums(
    values: Float[torch.Tensor, "tokens k"],
    rows: Float[torch.Tensor, "tokens width"],
    selection: LatentSelection,
) -> Float[torch.Tensor, "num_latents width"]:
    """
    Sum, for each latent, the rows of the tokens that selected it, weighted by its values.

    The product of the transposed sparse activations ``[num_latents, tokens]`` with
    ``rows``.

    Args:
        values: Values of the selected latents, ``[tokens, k]``.
        rows: One row for each token, ``[tokens, width]``.
        selection: The latents of each token.

    Returns:
        ``[num_latents, width]``; zero for a latent that nobody selected.
    """
    return _apply(latent_sums, values, rows, selection)


def transposed_latent_sums(
    values: Float[torch.Tensor, "tokens k"],
    rows: Float[torch.Tensor, "tokens width"],
    selection: LatentSelection,
) -> Float[torch.Tensor, "width num_latents"]:
    """
    :func:`latent_sums` transposed, as the gradient of an encoder is stored.

    Args:
        values: Values of the selected latents, ``[tokens, k]``.
        rows: One row for each token, ``[tokens, width]``.
        selection: The latents of each token.

    Returns:
        ``[width, num_latents]``, contiguous.
    """
    return _apply(transposed_latent_sums, values, rows, selection)


def _latent_sums(
    values: torch.Tensor, rows: torch.Tensor, s: LatentSelection
) -> torch.Tensor:
    out = (s.pool or BufferPool()).take((s.num_latents, rows.shape[-1]), rows)
    return _write_latent_sums(values, rows, s, out)


def _transposed_latent_sums(
    values: torch.Tensor, rows: torch.Tensor, s: LatentSelection
) -> torch.Tensor:
    out = (s.pool or BufferPool()).take((rows.shape[-1], s.num_latents), rows)
    _write_latent_sums(values, rows, s, out.T)
    return out


def _write_latent_sums(
    values: torch.Tensor,
    rows: torch.Tensor,
    selection: LatentSelection,
    out: torch.Tensor,
) -> torch.Tensor:
    order = selection.order
    if order is None:
        order = selection.indices.flatten().argsort(stable=True)
    kernels.latent_sums(values, rows, selection.indices, order, out)
    return out


_COMPUTE: dict[Any, Callable[..., torch.Tensor]] = {
    sparse_decode: lambda a, b, s: kernels.sparse_decode(a, b, s.indices),
    sampled_products: lambda a, b, s: kernels.sampled_products(a, b, s.indices),
    latent_sums: _latent_sums,
    transposed_latent_sums: _transposed_latent_sums,
}
_GRADIENT_IN_A: dict[Any, Callable[..., torch.Tensor]] = {
    sparse_decode: lambda grad, _, weights, s: sampled_products(grad, weights, s),
    sampled_products: lambda grad, _, weights, s: sparse_decode(grad, weights, s),
    latent_sums: lambda grad, _, rows, s: sampled_products(rows, grad, s),
    transposed_latent_sums: lambda grad, _, rows, s: sampled_products(rows, grad.T, s),
}
_GRADIENT_IN_B: dict[Any, Callable[..., torch.Tensor]] = {
    sparse_decode: lambda grad, values, _, s: latent_sums(values, grad, s),
    sampled_products: lambda grad, rows, _, s: latent_sums(grad, rows, s),
    latent_sums: lambda grad, values, _, s: sparse_decode(values, grad, s),
    transposed_latent_sums: lambda grad, values, _, s: sparse_decode(values, grad.T, s),
}

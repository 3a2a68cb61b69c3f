"""Products whose derivatives are products of the same kind, as autograd functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int

from .buffers import BufferPool


class Selection(NamedTuple):
    """
    What each token selected: latents, or experts.

    Attributes:
        indices: The selected items, in ``range(size)``; ``[tokens, k]``, int64.
        size: How many there are to select from.
        order: ``indices`` flattened and sorted by item, as positions in the unsorted;
            ``[tokens * k]``. Sorted when needed if None; see :meth:`with_order`.
        pool: Memory for results that are as large as weights, which are gradients most of
            the time; fresh memory if None.
    """

    indices: Int[torch.Tensor, "tokens k"]
    size: int
    order: Int[torch.Tensor, " tokens_k"] | None = None
    pool: BufferPool | None = None

    def with_order(self) -> "Selection":
        """The same selection with ``order``: one sort for all products that follow."""
        return (
            self if self.order is not None else self._replace(order=self.find_order())
        )

    def find_order(self) -> torch.Tensor:
        """``order``, sorted now if it was not; stable, so that results do not vary."""
        if self.order is not None:
            return self.order
        return self.indices.flatten().argsort(stable=True)

    def empty(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor of a shape, from the pool if there is one."""
        return (
            like.new_empty(shape) if self.pool is None else self.pool.take(shape, like)
        )


@dataclass(frozen=True)
class BilinearProduct:
    """
    A product of two tensors over a selection, linear in each.

    Attributes:
        compute: The result, from both factors and the selection.
        gradient_in_a: The gradient in the first factor, from the result's gradient, both
            factors and the selection; made of differentiable products itself.
        gradient_in_b: The same for the second factor.
    """

    compute: Callable[[torch.Tensor, torch.Tensor, Selection], torch.Tensor]
    gradient_in_a: Callable[..., torch.Tensor]
    gradient_in_b: Callable[..., torch.Tensor]

    def __call__(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        selection: Selection,
    ) -> torch.Tensor:
        """The product, differentiable to any order."""
        return _apply(self, a, b, *selection)


def eagerly(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """
    A function that torch.compile leaves alone.

    Work is cut by expert and by latent as the data have it, which no graph can hold.
    """
    return torch.compiler.disable(function.apply)


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


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(
        product: BilinearProduct,
        a: torch.Tensor,
        b: torch.Tensor,
        *selection: Any,
    ) -> torch.Tensor:
        return product.compute(a, b, Selection(*selection))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Any) -> None:
        ctx.product, a, b, indices, ctx.size, order, ctx.pool = inputs
        ctx.save_for_backward(a, b, indices, order)
        ctx.save_for_forward(a, b, indices, order)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a, b, selection = _Apply._restore(ctx)
        grad_a = grad_b = None
        if ctx.needs_input_grad[1]:
            grad_a = ctx.product.gradient_in_a(grads[0], a, b, selection)
        if ctx.needs_input_grad[2]:
            grad_b = ctx.product.gradient_in_b(grads[0], a, b, selection)
        return None, grad_a, grad_b, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        a, b, selection = _Apply._restore(ctx)
        terms = []
        if tangents[1] is not None:
            terms.append(ctx.product(tangents[1], b, selection))
        if tangents[2] is not None:
            terms.append(ctx.product(a, tangents[2], selection))
        return torch.stack(terms).sum(dim=0)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return torch.stack(one_by_one(_Apply, info, in_dims, inputs)), 0

    @staticmethod
    def _restore(ctx: Any) -> tuple[torch.Tensor, torch.Tensor, Selection]:
        a, b, indices, order = ctx.saved_tensors
        return a, b, Selection(indices, ctx.size, order, ctx.pool)


_apply = eagerly(_Apply)

"""Products over a sparsity pattern, whose derivatives are products of the same kind."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int

from .buffers import BufferPool


class SparsityPattern(NamedTuple):
    """
    The latents, or the experts, of each token: the non-zeros of a ``[tokens, size]`` matrix.

    Attributes:
        indices: Columns of each row's non-zeros, in ``range(size)``, or ``size`` where a row
            has fewer than others; ``[tokens, k]``, int64.
        size: Number of columns: of latents, or of experts.
        order: ``indices`` flattened and sorted by column, as positions in the unsorted;
            ``[tokens * k]``. None until :meth:`sorted` finds it.
        pool: Memory for results that are as large as weights, which are gradients most of
            the time; fresh memory if None.
        ragged: Whether some rows have fewer non-zeros than others.
    """

    indices: Int[torch.Tensor, "tokens k"]
    size: int
    order: Int[torch.Tensor, " tokens_k"] | None = None
    pool: BufferPool | None = None
    ragged: bool = False

    def sorted(self) -> "SparsityPattern":
        """The same pattern with ``order``: one sort for all products that follow."""
        return (
            self if self.order is not None else self._replace(order=self.find_order())
        )

    def find_order(self) -> Int[torch.Tensor, " tokens_k"]:
        """``order``, sorted now if it was not; stable, so that results do not vary."""
        if self.order is not None:
            return self.order
        return self.indices.flatten().argsort(stable=True)

    def starts(self) -> Int[torch.Tensor, " size_plus_1"]:
        """Starts of the columns' non-zeros in ``order``, and the end of the last's."""
        # bincount would wait for the GPU, to see how many columns there are.
        after = self.indices.flatten() + 1
        counts = after.new_zeros(self.size + 2)
        return counts.scatter_add_(0, after, torch.ones_like(after)).cumsum(0)[:-1]

    def empty(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor of a shape, from the pool if there is one."""
        if self.pool is None:
            return like.new_empty(shape)
        return self.pool.take(shape, like)


@dataclass(frozen=True)
class BilinearProduct:
    """
    A product of two tensors over a sparsity pattern, linear in each.

    Both factors may have any floating-point dtype; the result has the wider of the two.
    Under autocast, matrix products inside are computed in autocast's dtype, in the
    backward pass too, and the result's dtype stays.

    Attributes:
        compute: The result, from both factors, of one dtype, and the pattern.
        gradient_in_a: The gradient in the first factor, from the result's gradient, both
            factors and the pattern; made of differentiable products itself.
        gradient_in_b: The same for the second factor.
    """

    compute: Callable[[torch.Tensor, torch.Tensor, SparsityPattern], torch.Tensor]
    gradient_in_a: Callable[..., torch.Tensor]
    gradient_in_b: Callable[..., torch.Tensor]

    def __call__(
        self, a: torch.Tensor, b: torch.Tensor, pattern: SparsityPattern
    ) -> torch.Tensor:
        """The product, differentiable to any order."""
        dtype = torch.promote_types(a.dtype, b.dtype)
        return _apply(self, a.to(dtype), b.to(dtype), *pattern)


def opaque_to_compiler(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """
    A function that torch.compile calls as it is.

    Work is cut by expert and by latent as the data have it, which no graph can hold.
    """
    return torch.compiler.disable(function.apply)


def vmap_by_loop(
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
        product: BilinearProduct, a: torch.Tensor, b: torch.Tensor, *pattern: Any
    ) -> torch.Tensor:
        return product.compute(a, b, SparsityPattern(*pattern))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Any) -> None:
        ctx.product, a, b, indices, ctx.size, order, ctx.pool, ctx.ragged = inputs
        device = a.device.type
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        ctx.save_for_backward(a, b, indices, order)
        ctx.save_for_forward(a, b, indices, order)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a, b, pattern = _Apply._restore(ctx)
        grad_a = grad_b = None
        with torch.autocast(**ctx.autocast):
            if ctx.needs_input_grad[1]:
                grad_a = ctx.product.gradient_in_a(grads[0], a, b, pattern)
            if ctx.needs_input_grad[2]:
                grad_b = ctx.product.gradient_in_b(grads[0], a, b, pattern)
        return None, grad_a, grad_b, *[None] * 5

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        a, b, pattern = _Apply._restore(ctx)
        terms = []
        if tangents[1] is not None:
            terms.append(ctx.product(tangents[1], b, pattern))
        if tangents[2] is not None:
            terms.append(ctx.product(a, tangents[2], pattern))
        return torch.stack(terms).sum(dim=0)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return torch.stack(vmap_by_loop(_Apply, info, in_dims, inputs)), 0

    @staticmethod
    def _restore(ctx: Any) -> tuple[torch.Tensor, torch.Tensor, SparsityPattern]:
        a, b, indices, order = ctx.saved_tensors
        return a, b, SparsityPattern(indices, ctx.size, order, ctx.pool, ctx.ragged)


_apply = opaque_to_compiler(_Apply)

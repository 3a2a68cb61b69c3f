"""The non-zeros of a sparse matrix that has as many in each row."""

from typing import NamedTuple

import torch
from jaxtyping import Int

from .buffers import BufferPool


class SparsityPattern(NamedTuple):
    """
    The latents, or the experts, of each token: the non-zeros of a ``[tokens, size]`` matrix.

    Attributes:
        indices: Columns of each row's non-zeros, in ``range(size)``; ``[tokens, k]``, int64.
        size: Number of columns: of latents, or of experts.
        order: ``indices`` flattened and sorted by column, as positions in the unsorted;
            ``[tokens * k]``. None until :meth:`sorted` finds it.
        pool: Memory for results that are as large as weights, which are gradients most of
            the time; fresh memory if None.
    """

    indices: Int[torch.Tensor, "tokens k"]
    size: int
    order: Int[torch.Tensor, " tokens_k"] | None = None
    pool: BufferPool | None = None

    def sorted(self) -> "SparsityPattern":
        """The same pattern with ``order``: one sort for all products that follow."""
        if self.order is not None:
            return self
        # Stable, so that results do not vary from run to run.
        return self._replace(order=self.indices.flatten().argsort(stable=True))

    def counts(self) -> Int[torch.Tensor, " size"]:
        """Number of non-zeros in each column."""
        return torch.bincount(self.indices.flatten(), minlength=self.size)

    def empty(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor of a shape, from the pool if there is one."""
        if self.pool is None:
            return like.new_empty(shape)
        return self.pool.take(shape, like)

"""Types that all layers share."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int

from .buffers import zeros

GateName = Literal["softmax", "renormalized", "rescaled", "double_softmax", "uniform"]
TopKOver = Literal["activations", "gated_activations"]
DecompositionName = Literal["mean", "identity", "learned"]


class SparseLatents(NamedTuple):
    """
    The latents that survive TopK, compactly: at most ``k`` per token.

    Attributes:
        values: Feature activations, after ReLU and gate. Shape ``[..., k]``.
        indices: Their latents, in ``range(d_sae)``. Shape ``[..., k]``, int64.
    """

    values: Float[torch.Tensor, "*batch k"]
    indices: Int[torch.Tensor, "*batch k"]

    def to_dense(self, d_sae: int) -> Float[torch.Tensor, "*batch d_sae"]:
        """The same activations ``[..., d_sae]``, zero elsewhere; differentiable."""
        dense = zeros((*self.values.shape[:-1], d_sae), self.values)
        return dense.scatter_add_(-1, self.indices, self.values)

    def to_coo(self, d_sae: int) -> torch.Tensor:
        """The same activations as a sparse COO tensor ``[..., d_sae]``."""
        batch, k = self.values.shape[:-1], self.values.shape[-1]
        tokens = torch.arange(batch.numel(), device=self.values.device)
        positions = torch.unravel_index(tokens.repeat_interleave(k), batch)
        return torch.sparse_coo_tensor(
            torch.stack([*positions, self.indices.flatten()]),
            self.values.flatten(),
            (*batch, d_sae),
            check_invariants=False,
        )

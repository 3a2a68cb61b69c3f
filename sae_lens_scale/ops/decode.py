"""Decoding of compact activations."""

import torch
import torch.nn.functional as F
from jaxtyping import Float

from .types import SparseLatents


def decoder_norm(
    W_dec: Float[torch.Tensor, "d_sae d_in"],
) -> Float[torch.Tensor, " d_sae"]:
    """
    Norms of the decoder rows, kept above the 1e-8 of SAELens's own folding.

    Without the floor, a row that is exactly zero turns ``0 * (1 / 0)`` into NaN.
    """
    return W_dec.norm(dim=-1).clamp(min=1e-8)


def sparse_decode(
    latents: SparseLatents, W_dec: Float[torch.Tensor, "d_sae d_in"]
) -> Float[torch.Tensor, "tokens d_in"]:
    """
    Sum the decoder rows of each token's latents, weighted by their values.

    Args:
        latents: Compact activations, ``[tokens, k]``.
        W_dec: Decoder weights, ``[d_sae, d_in]``.

    Returns:
        ``[tokens, d_in]``, without decoder bias.
    """
    return F.embedding_bag(
        latents.indices,
        W_dec,
        per_sample_weights=latents.values.to(W_dec.dtype),
        mode="sum",
    )

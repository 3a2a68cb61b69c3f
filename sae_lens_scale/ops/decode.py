"""Decoding."""

import torch
import torch.nn.functional as F
from jaxtyping import Float


def decoder_norm(
    W_dec: Float[torch.Tensor, "d_sae d_in"],
) -> Float[torch.Tensor, " d_sae"]:
    """
    Norms of the decoder rows, kept above the 1e-8 of SAELens's own folding.

    Without the floor, a row that is exactly zero turns ``0 * (1 / 0)`` into NaN.
    """
    return W_dec.norm(dim=-1).clamp(min=1e-8)


def decode_nonzero(
    acts: Float[torch.Tensor, "tokens d_sae"],
    weights: Float[torch.Tensor, "d_sae width"],
    scales: Float[torch.Tensor, " d_sae"] | None = None,
) -> Float[torch.Tensor, "tokens width"]:
    """
    ``(acts * scales) @ weights``, at the cost of the activations that are not zero; no gradient.

    Args:
        acts: Activations, most of them zero, ``[tokens, d_sae]``.
        weights: One row for each latent, ``[d_sae, width]``.
        scales: What to multiply each latent's activations by, ``[d_sae]``.

    Returns:
        ``[tokens, width]``.
    """
    tokens, latents = acts.nonzero(as_tuple=True)
    values = acts[tokens, latents]
    if scales is not None:
        values = values * scales[latents]
    counts = torch.bincount(tokens, minlength=len(acts))
    return F.embedding_bag(
        latents,
        weights,
        counts.cumsum(0) - counts,
        per_sample_weights=values.to(weights.dtype),
        mode="sum",
    )

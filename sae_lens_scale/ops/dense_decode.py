"""Decoding of activations that are d_sae wide."""

import torch
import torch.nn.functional as F
from jaxtyping import Float

from .autograd import BilinearProduct, SparsityPattern

# Speed of decoding an activation in a dense product, by that of decoding it alone: 838 ms
# for 100 million of them, against 8 ms for 131 thousand and 60 ms to find these (2 x86
# cores, rows of 768 float32).
_DENSE_SPEEDUP = 20


def decoder_norm(
    W_dec: Float[torch.Tensor, "d_sae d_in"],
) -> Float[torch.Tensor, " d_sae"]:
    """
    Norms of the decoder rows, kept above the 1e-8 of SAELens's own folding.

    Without the floor, a row that is exactly zero turns ``0 * (1 / 0)`` into NaN. Float16,
    in which 1e-8 is 0, has its smallest normal number instead, whose inverse is finite.
    """
    floor = max(1e-8, torch.finfo(W_dec.dtype).tiny)
    return W_dec.norm(dim=-1).clamp(min=floor)


def decode_dense(
    acts: Float[torch.Tensor, "tokens d_sae"],
    W_dec: Float[torch.Tensor, "d_sae d_in"],
) -> Float[torch.Tensor, "tokens d_in"]:
    """
    ``acts @ W_dec``, on the CPU at the cost of the activations that are not zero.

    Its gradients are dense: those of activations that are zero, too. Where rows of W_dec
    are infinite or NaN, activations that are zero make NaN of them only if most are not.

    Args:
        acts: Activations, ``[tokens, d_sae]``.
        W_dec: Decoder weights, ``[d_sae, d_in]``.

    Returns:
        ``[tokens, d_in]``, without decoder bias.
    """
    return _DECODE_DENSE(acts, W_dec, _NO_PATTERN)


def _decode(
    acts: torch.Tensor, W_dec: torch.Tensor, _: SparsityPattern
) -> torch.Tensor:
    on_cpu = acts.device.type == "cpu"
    if not on_cpu or acts.count_nonzero() * _DENSE_SPEEDUP >= acts.numel():
        # Autocast computes it in another dtype.
        return (acts @ W_dec).to(acts.dtype)
    tokens, latents = acts.nonzero(as_tuple=True)
    counts = torch.bincount(tokens, minlength=len(acts))
    return F.embedding_bag(
        latents,
        W_dec,
        counts.cumsum(0) - counts,
        per_sample_weights=acts[tokens, latents],
        mode="sum",
    )


_NO_PATTERN = SparsityPattern(torch.zeros(0, 0, dtype=torch.int64), 0)
_DECODE_DENSE = BilinearProduct(
    _decode,
    lambda grad, _, W_dec, _pattern: grad @ W_dec.T,
    lambda grad, acts, _, _pattern: acts.T @ grad,
)

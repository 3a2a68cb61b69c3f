"""
Products with the weights of the selected experts only.

As in :mod:`.latent_products`, three products are each other's derivatives, here of dense
``rows`` ``[tokens, width]``, ``acts`` ``[tokens, experts_per_token, n]`` that are dense
within each selected expert, and the experts' matrices ``[num_experts, width, n]``.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int

from . import torch_backend as kernels
from .autograd import BilinearProduct, Selection


def grouped_encode(
    x: Float[torch.Tensor, "tokens d_in"],
    W_enc: Float[torch.Tensor, "d_in d_sae"],
    expert_indices: Int[torch.Tensor, "tokens experts_per_token"],
    num_experts: int,
) -> Float[torch.Tensor, "tokens experts_per_token expert_size"]:
    """
    Products ``x W_enc`` for the latents of each token's experts, without bias.

    Tokens are sorted by expert, so that each expert costs one matrix product
    over the tokens that selected it; an expert that got no token costs nothing.

    Args:
        x: Encoder input, ``[tokens, d_in]``.
        W_enc: Encoder weights, ``[d_in, d_sae]``; latent ``j`` belongs to expert
            ``j // (d_sae / num_experts)``.
        expert_indices: Selected experts, ``[tokens, experts_per_token]``.
        num_experts: Number of experts; divides d_sae.

    Returns:
        ``[tokens, experts_per_token, d_sae / num_experts]``.
    """
    matrices = rearrange(W_enc, "d (N n) -> N d n", N=num_experts)
    return _ENCODE(x, matrices, Selection(expert_indices, num_experts).with_order())


def grouped_decode(
    acts: Float[torch.Tensor, "tokens experts_per_token expert_size"],
    W_dec: Float[torch.Tensor, "d_sae d_in"],
    expert_indices: Int[torch.Tensor, "tokens experts_per_token"],
    num_experts: int,
) -> Float[torch.Tensor, "tokens d_in"]:
    """
    Decode activations that are dense within each token's experts.

    The counterpart of :func:`grouped_encode`, for when so many of an expert's
    latents are active that a product beats gathering single rows.

    Args:
        acts: Activations of the selected experts' latents,
            ``[tokens, experts_per_token, d_sae / num_experts]``.
        W_dec: Decoder weights, ``[d_sae, d_in]``.
        expert_indices: Selected experts, ``[tokens, experts_per_token]``.
        num_experts: Number of experts; divides d_sae.

    Returns:
        The sum over experts of ``acts @ W_dec``, ``[tokens, d_in]``.
    """
    matrices = rearrange(W_dec, "(N n) d -> N d n", N=num_experts)
    return _DECODE(acts, matrices, Selection(expert_indices, num_experts).with_order())


_ENCODE = BilinearProduct(
    kernels.grouped_encode,
    lambda grad, _, matrices, s: _DECODE(grad, matrices, s),
    lambda grad, rows, _, s: _SUMS(rows, grad, s),
)
_DECODE = BilinearProduct(
    kernels.grouped_decode,
    lambda grad, _, matrices, s: _ENCODE(grad, matrices, s),
    lambda grad, acts, _, s: _SUMS(grad, acts, s),
)
# For each expert, ``rows.T @ acts`` over its tokens.
_SUMS = BilinearProduct(
    kernels.grouped_sums,
    lambda grad, _, acts, s: _DECODE(acts, grad, s),
    lambda grad, rows, _, s: _ENCODE(rows, grad, s),
)

"""
Products with the weights of the selected experts only.

As in :mod:`.sparse_products`, three products are each other's derivatives, here of dense
``rows`` ``[tokens, width]``, ``acts`` ``[tokens, experts_per_token, n]`` that are dense
within each selected expert, and the experts' matrices ``[num_experts, width, n]``.
"""

from types import ModuleType

import torch
from einops import rearrange
from jaxtyping import Float, Int

from . import torch_backend
from .autograd import BilinearProduct, SparsityPattern
from .backend import backend_for


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
    return _ENCODE(x, matrices, SparsityPattern(expert_indices, num_experts).sorted())


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
    return _DECODE(
        acts, matrices, SparsityPattern(expert_indices, num_experts).sorted()
    )


def _backend(factor: torch.Tensor, other: torch.Tensor, *sizes: int) -> ModuleType:
    """torch's own grouped product where there is one, for matrices of these sizes."""
    if torch_backend.has_grouped_kernel(factor, *sizes):
        return torch_backend
    return backend_for(factor, other)


_ENCODE = BilinearProduct(
    lambda rows, matrices, p: _backend(
        rows, matrices, *matrices.shape[1:]
    ).grouped_encode(rows, matrices, p),
    lambda grad, _, matrices, p: _DECODE(grad, matrices, p),
    lambda grad, rows, _, p: _SUMS(rows, grad, p),
)
_DECODE = BilinearProduct(
    lambda acts, matrices, p: _backend(
        acts, matrices, *matrices.shape[1:]
    ).grouped_decode(acts, matrices, p),
    lambda grad, _, matrices, p: _ENCODE(grad, matrices, p),
    lambda grad, acts, _, p: _SUMS(grad, acts, p),
)
# For each expert, ``rows.T @ acts`` over its tokens.
_SUMS = BilinearProduct(
    lambda rows, acts, p: _backend(
        rows, acts, rows.shape[-1], acts.shape[-1]
    ).grouped_sums(rows, acts, p),
    lambda grad, _, acts, p: _DECODE(acts, grad, p),
    lambda grad, rows, _, p: _ENCODE(rows, grad, p),
)

"""
Feature scaling: amplification of what an expert's latents do not share.

Equation 2.5 of the Scale SAE paper splits an expert's encoder weights into a
low-pass part and the deviation from it, and amplifies the deviation:
``W_hat = low + (1 + omega) (W - low)``. Appendix C names three low-pass parts:

- ``"mean"``: the mean of the expert's encoder vectors (the paper's method);
- ``"identity"``: the rectangular identity, so that latent j of an expert has the
  j-th unit vector as its low-pass part, or zero for j >= d_in;
- ``"learned"``: the mean mapped by a learned ``[d_in, d_in]`` matrix that starts at
  the identity, as in the authors' code.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, Int

from sae_lens_scale.ops import DecompositionName


def _low_pass_vectors(
    W_enc: Float[torch.Tensor, "d_in d_sae"],
    num_experts: int,
    W_low_pass: Float[torch.Tensor, "d_in d_in"] | None,
) -> Float[torch.Tensor, "d_in num_experts"]:
    """Each expert's low-pass vector, for the decompositions that have only one."""
    mean = reduce(W_enc, "d (N n) -> d N", "mean", N=num_experts)
    return mean if W_low_pass is None else W_low_pass @ mean


def scaled_encoder(
    W_enc: Float[torch.Tensor, "d_in d_sae"],
    omega: Float[torch.Tensor, " num_experts"],
    decomposition: DecompositionName,
    W_low_pass: Float[torch.Tensor, "d_in d_in"] | None = None,
) -> Float[torch.Tensor, "d_in d_sae"]:
    """
    The scaled encoder ``W_hat`` of equation 2.5, written out.

    Training never builds it (see :func:`scale_pre_acts`); exports fold it in.

    Args:
        W_enc: Encoder weights, ``[d_in, d_sae]``.
        omega: Amplification of each expert, ``[num_experts]``.
        decomposition: The low-pass part.
        W_low_pass: The learned map, ``[d_in, d_in]``; with ``"learned"`` only.

    Returns:
        ``[d_in, d_sae]``.
    """
    experts = rearrange(W_enc, "d (N n) -> d N n", N=len(omega))
    if decomposition == "identity":
        d_in, _, expert_size = experts.shape
        low = torch.eye(d_in, expert_size, dtype=W_enc.dtype, device=W_enc.device)
        low = low.unsqueeze(1)
    else:
        low = _low_pass_vectors(W_enc, len(omega), W_low_pass).unsqueeze(-1)
    scaled = experts + omega[:, None] * (experts - low)
    return rearrange(scaled, "d N n -> d (N n)")


def scale_pre_acts(
    products: Float[torch.Tensor, "*batch experts_per_token expert_size"],
    x: Float[torch.Tensor, "*batch d_in"],
    expert_indices: Int[torch.Tensor, "*batch experts_per_token"],
    W_enc: Float[torch.Tensor, "d_in d_sae"],
    omega: Float[torch.Tensor, " num_experts"],
    decomposition: DecompositionName,
    W_low_pass: Float[torch.Tensor, "d_in d_in"] | None = None,
) -> Float[torch.Tensor, "*batch experts_per_token expert_size"]:
    """
    Turn ``x W`` into ``x W_hat`` without building the scaled encoder.

    Linearity gives ``x W_hat = x W + omega (x W - x low)``: beside the products,
    one scalar and one dot product per token and selected expert.

    Args:
        products: ``x W_enc`` for the selected experts' latents, without bias,
            ``[..., experts_per_token, expert_size]``.
        x: Encoder input, ``[..., d_in]``.
        expert_indices: Selected experts, ``[..., experts_per_token]``.
        W_enc: Encoder weights, ``[d_in, d_sae]``.
        omega: Amplification of each expert, ``[num_experts]``.
        decomposition: The low-pass part.
        W_low_pass: The learned map, ``[d_in, d_in]``; with ``"learned"`` only.

    Returns:
        ``x W_hat``, in the shape of ``products``.
    """
    if decomposition == "identity":
        expert_size = products.shape[-1]
        low = F.pad(x, (0, max(0, expert_size - x.shape[-1])))
        low = low[..., :expert_size].unsqueeze(-2)
    else:
        vectors = _low_pass_vectors(W_enc, len(omega), W_low_pass)
        low = (x @ vectors).gather(-1, expert_indices).unsqueeze(-1)
    return products + omega[expert_indices].unsqueeze(-1) * (products - low)

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


def low_pass_products(
    x: Float[torch.Tensor, "*batch d_in"],
    expert_indices: Int[torch.Tensor, "*batch experts_per_token"],
    W_enc: Float[torch.Tensor, "d_in d_sae"],
    num_experts: int,
    decomposition: DecompositionName,
    W_low_pass: Float[torch.Tensor, "d_in d_in"] | None = None,
) -> Float[torch.Tensor, "*batch #experts_per_token #expert_size"]:
    """
    Products of the input with the low-pass parts of its experts.

    Those of ``"mean"`` are also the means of the products with an expert's latents, which
    cost less where these products are known.

    Args:
        x: Encoder input, ``[..., d_in]``.
        expert_indices: Selected experts, ``[..., experts_per_token]``.
        W_enc: Encoder weights, ``[d_in, d_sae]``.
        num_experts: Number of experts; divides d_sae.
        decomposition: The low-pass part.
        W_low_pass: The learned map, ``[d_in, d_in]``; with ``"learned"`` only.

    Returns:
        ``[..., experts_per_token, 1]``, or ``[..., 1, expert_size]`` for ``"identity"``,
        whose low-pass parts are the same for all experts.
    """
    if decomposition == "identity":
        expert_size = W_enc.shape[-1] // num_experts
        low = F.pad(x, (0, max(0, expert_size - x.shape[-1])))
        return low[..., :expert_size].unsqueeze(-2)
    vectors = _low_pass_vectors(W_enc, num_experts, W_low_pass)
    return (x @ vectors).gather(-1, expert_indices).unsqueeze(-1)


def scale_pre_acts(
    products: torch.Tensor, low: torch.Tensor, omega: torch.Tensor
) -> torch.Tensor:
    """
    Turn ``x W`` into ``x W_hat`` without building the scaled encoder.

    Linearity gives ``x W_hat = x W + omega (x W - x low)``: beside the products,
    one scalar and one dot product per token and selected expert.

    Args:
        products: ``x W_enc`` for any latents, without bias.
        low: :func:`low_pass_products` for the same latents.
        omega: Amplification of the same latents' experts.

    Returns:
        ``x W_hat``; the arguments' shapes broadcast.
    """
    return torch.addcmul(products, omega, products - low)

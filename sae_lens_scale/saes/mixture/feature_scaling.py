"""
Feature scaling: amplification of what an expert's latents do not share.

Equation 2.5 of the Scale SAE paper splits an expert's encoder weights into a low-pass part
and the deviation from it, and amplifies the deviation:
``W_hat = low + (1 + omega) (W - low)``. The paper's method takes the mean of the expert's
encoder vectors for the low-pass part; Appendix C compares it with two others.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int

from sae_lens_scale.ops import lookup

DecompositionName = Literal["mean", "identity", "learned"]


class Decomposition(NamedTuple):
    """
    A way to split an expert's encoder vectors.

    Attributes:
        low_pass: The low-pass part, which broadcasts to the encoder vectors
            ``[d_in, num_experts, expert_size]``, from these and from W_low_pass.
        meaning: Description for the documentation.
    """

    low_pass: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
    meaning: str


def _mean(experts: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
    return experts.mean(dim=-1, keepdim=True)


def _identity(experts: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
    d_in, _num_experts, expert_size = experts.shape
    like = {"dtype": experts.dtype, "device": experts.device}
    return torch.eye(d_in, expert_size, **like).unsqueeze(1)


def _learned(experts: torch.Tensor, W_low_pass: torch.Tensor | None) -> torch.Tensor:
    assert W_low_pass is not None
    return (W_low_pass @ experts.mean(dim=-1)).unsqueeze(-1)


DECOMPOSITIONS: dict[DecompositionName, Decomposition] = {
    "mean": Decomposition(_mean, "mean of the expert's encoder vectors"),
    "identity": Decomposition(
        _identity,
        "j-th unit vector, zero for j ≥ d (the rectangular identity of Appendix C.2)",
    ),
    "learned": Decomposition(
        _learned,
        "the mean mapped by a learned d × d matrix `W_low_pass` that starts at the identity",
    ),
}


def scaled_encoder(
    W_enc: Float[torch.Tensor, "d_in d_sae"],
    omega: Float[torch.Tensor, " num_experts"],
    decomposition: DecompositionName,
    W_low_pass: Float[torch.Tensor, "d_in d_in"] | None = None,
) -> Float[torch.Tensor, "d_in d_sae"]:
    """
    The scaled encoder ``W_hat`` of equation 2.5, written out.

    Exports hold it, and training with the decompositions of Appendix C builds it. Training
    with "mean" does not: see :func:`expert_scaling`.

    Args:
        W_enc: Encoder weights, ``[d_in, d_sae]``.
        omega: Amplification of each expert, ``[num_experts]``.
        decomposition: The low-pass part.
        W_low_pass: The learned map, ``[d_in, d_in]``; with "learned" only.

    Returns:
        ``[d_in, d_sae]``, differentiable.
    """
    experts = rearrange(W_enc, "d (N n) -> d N n", N=len(omega))
    low = DECOMPOSITIONS[decomposition].low_pass(experts, W_low_pass)
    scaled = experts + omega[:, None] * (experts - low)
    return rearrange(scaled, "d N n -> d (N n)")


class ExpertScaling(NamedTuple):
    """
    Feature scaling of products with the selected experts: ``scale * product + shift``.

    Attributes:
        scale: ``1 + omega`` of each token's experts, ``[rows, e]``.
        shift: ``-omega`` times the products with their low-pass parts, likewise.
    """

    scale: Float[torch.Tensor, "rows e"]
    shift: Float[torch.Tensor, "rows e"]

    def apply(
        self,
        products: Float[torch.Tensor, "rows m"],
        bias: Float[torch.Tensor, "rows m"],
        slots: Int[torch.Tensor, "rows m"] | None = None,
    ) -> Float[torch.Tensor, "rows m"]:
        """
        Scale products, and add a bias.

        Args:
            products: Products with latents of the selected experts, ``[rows, m]``, or
                with as many of each, ``[rows, e, n]``.
            bias: Bias of each.
            slots: Positions of their experts among the token's, in the former case.

        Returns:
            In the shape and dtype of ``products``.
        """
        if slots is None:
            scale, shift = self.scale.unsqueeze(-1), self.shift.unsqueeze(-1)
        else:
            scale, shift = self.scale.gather(1, slots), self.shift.gather(1, slots)
        return torch.addcmul(bias + shift, products, scale).to(products.dtype)


def expert_scaling(
    omega: Float[torch.Tensor, " num_experts"],
    experts: Int[torch.Tensor, "rows e"],
    mean_products: Float[torch.Tensor, "rows e"],
) -> ExpertScaling:
    """
    Feature scaling with the "mean" decomposition, without the scaled encoder.

    Linearity gives ``x W_hat = (1 + omega) x W - omega x mean``, and the product with an
    expert's mean vector is the mean of the products with its vectors.

    Args:
        omega: Amplification of each expert, ``[num_experts]``.
        experts: Selected experts, ``[rows, e]``.
        mean_products: Mean of the products with each selected expert, likewise.

    Returns:
        A scale and a shift for each selected expert, in at least float32: 1 + omega would
        lose a small omega in bfloat16.
    """
    dtype = torch.promote_types(omega.dtype, torch.float32)
    selected = lookup(omega.to(dtype), experts)
    return ExpertScaling(1 + selected, -selected * mean_products.to(dtype))

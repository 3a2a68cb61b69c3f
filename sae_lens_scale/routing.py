"""Routing of tokens to experts, as functions over plain tensors."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int

from sae_lens_scale.ops import GateName


class Routing(NamedTuple):
    """
    Which experts each token selected, and how much each counts.

    Attributes:
        weights: Gates of the selected experts, strongest expert first,
            ``[..., experts_per_token]``.
        indices: The selected experts, ``[..., experts_per_token]``, int64.
        probabilities: Softmax over all experts, ``[..., num_experts]``.
    """

    weights: Float[torch.Tensor, "*batch experts_per_token"]
    indices: Int[torch.Tensor, "*batch experts_per_token"]
    probabilities: Float[torch.Tensor, "*batch num_experts"]


def route(
    x: Float[torch.Tensor, "*batch d_in"],
    W_router: Float[torch.Tensor, "d_in num_experts"],
    b_router: Float[torch.Tensor, " d_in"],
    experts_per_token: int,
    gate: GateName,
) -> Routing:
    """
    Select each token's experts from ``p = softmax((x - b_router) W_router)``.

    Computed in float32 at least, also under autocast: rounding logits to bfloat16
    moves about one token in a hundred to another expert.

    Args:
        x: Normalised activations before b_dec is subtracted, ``[..., d_in]``.
        W_router: Router weights, ``[d_in, num_experts]``.
        b_router: Router centre, ``[d_in]``.
        experts_per_token: How many experts each token selects (e).
        gate: What multiplies a selected expert's activations. ``"softmax"`` is p
            itself (equation 2.4 of the Scale SAE paper, and Switch SAE);
            ``"renormalized"`` divides it by its sum over the selected experts;
            ``"rescaled"`` is that times e, so that gates average 1;
            ``"double_softmax"`` is a softmax over the selected p (the Scale SAE
            authors' code); ``"uniform"`` is 1 (Switch SAE's "heaviside").

    Returns:
        The routing, in at least float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, b_router, W_router = x.to(dtype), b_router.to(dtype), W_router.to(dtype)
    center = b_router.detach()
    with torch.autocast(x.device.type, enabled=False):
        # The last term is zero. It gives b_router its gradient from one vector, where
        # x - b_router would need the gradient of every token.
        logits = (x - center) @ W_router + (center - b_router) @ W_router
    probabilities = logits.softmax(dim=-1)
    # Ranked by logits, which stay distinct where probabilities underflow to 0.
    selected = logits.topk(experts_per_token, dim=-1)
    # The softmax over the selected logits is p divided by its selected sum.
    renormalized = selected.values.softmax(dim=-1)
    selected_p = probabilities.gather(-1, selected.indices)
    weights = {
        "softmax": lambda: selected_p,
        "renormalized": lambda: renormalized,
        "rescaled": lambda: renormalized * experts_per_token,
        "double_softmax": lambda: selected_p.softmax(dim=-1),
        "uniform": lambda: torch.ones_like(selected_p),
    }[gate]()
    return Routing(weights, selected.indices, probabilities)


def expert_load(
    indices: Int[torch.Tensor, "*batch experts_per_token"],
    num_experts: int,
    dtype: torch.dtype = torch.float32,
) -> Float[torch.Tensor, " num_experts"]:
    """Share of all selections that went to each expert, ``[num_experts]``; sums to 1."""
    counts = torch.bincount(indices.flatten(), minlength=num_experts)
    return counts.to(dtype) / indices.numel()


def load_balance_loss(routing: Routing, num_experts: int) -> Float[torch.Tensor, ""]:
    """
    Switch Transformer's balancing term ``N * sum_i f_i P_i`` (equation 2.2).

    ``f_i`` is the share of selections that expert i got, counted over all selected
    experts, and ``P_i`` its mean probability. It is 1 for a uniform router.

    Args:
        routing: Routing of a batch.
        num_experts: Number of experts (N).

    Returns:
        A scalar, differentiable through the probabilities.
    """
    mean_p = routing.probabilities.reshape(-1, num_experts).mean(dim=0)
    load = expert_load(routing.indices, num_experts, mean_p.dtype)
    return num_experts * (load * mean_p).sum()

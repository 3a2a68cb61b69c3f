"""Routing of tokens to experts."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int

from sae_lens_scale.ops import SparsityPattern

GateName = Literal["softmax", "renormalized", "rescaled", "double_softmax", "uniform"]


class Gate(NamedTuple):
    """
    A multiplier of the selected experts' activations.

    Attributes:
        weights: The gates, ``[..., experts]``, from the selected experts' probabilities and
            from these divided by their sum, both of this shape.
        formula: Formula for the documentation, of expert i.
        source: Source of the formula.
    """

    weights: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    formula: str
    source: str


GATES: dict[GateName, Gate] = {
    "softmax": Gate(lambda p, _: p, "p_i", "equation 2.4; Switch SAE"),
    "renormalized": Gate(lambda _, share: share, "p_i / Σ_selected p", ""),
    "rescaled": Gate(
        lambda _, share: share * share.shape[-1],
        "e · p_i / Σ_selected p, so that gates average 1",
        "",
    ),
    "double_softmax": Gate(
        lambda p, _: p.softmax(dim=-1),
        "softmax over the selected p",
        "the Scale SAE authors' code",
    ),
    "uniform": Gate(lambda p, _: torch.ones_like(p), "1", 'Switch SAE\'s "heaviside"'),
}


class Routing(NamedTuple):
    """
    The experts that each token selected, and how much each counts.

    Attributes:
        weights: Gates of the selected experts: shared ones, then the others, strongest
            first, ``[..., experts_per_token]``.
        indices: The selected experts, ``[..., experts_per_token]``, int64.
        probabilities: Softmax over all experts that are not shared,
            ``[..., num_experts]``; 0 for those that are.
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
    num_shared_experts: int = 0,
) -> Routing:
    """
    Select each token's experts from ``p = softmax((x - b_router) W_router)``.

    Computed in float32 at least, also under autocast: rounding logits to bfloat16
    moves about one token in a hundred to another expert.

    Args:
        x: Normalised activations before b_dec is subtracted, ``[..., d_in]``.
        W_router: Router weights, ``[d_in, num_experts]``.
        b_router: Router centre, ``[d_in]``.
        experts_per_token: Number of experts that each token selects (e).
        gate: Multiplier of a selected expert's activations; see :data:`GATES`.
        num_shared_experts: Number of experts, the first ones, that all tokens select, with
            gate 1 (Dai et al. 2024, DeepSeekMoE). The others are routed as if there were
            no more, ``experts_per_token - num_shared_experts`` of them to each token.

    Returns:
        The routing, in at least float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, b_router, W_router = x.to(dtype), b_router.to(dtype), W_router.to(dtype)
    b = b_router.detach()
    with torch.autocast(x.device.type, enabled=False):
        # The last term is zero. It gives b_router its gradient from one vector, where
        # x - b_router would need the gradient of every token.
        logits = (x - b) @ W_router + (b - b_router) @ W_router
    # Nobody asks for the logits of shared experts.
    logits = logits[..., num_shared_experts:]
    experts_per_token -= num_shared_experts
    probabilities = logits.softmax(dim=-1)
    # Ranked by logits, which stay distinct where probabilities underflow to 0.
    selected = logits.topk(experts_per_token, dim=-1)
    # The softmax over the selected logits is p divided by its selected sum.
    renormalized = selected.values.softmax(dim=-1)
    selected_p = probabilities.gather(-1, selected.indices)
    weights = GATES[gate].weights(selected_p, renormalized)
    if not num_shared_experts:
        return Routing(weights, selected.indices, probabilities)
    shared = torch.arange(num_shared_experts, device=x.device)
    shared = shared.expand(*selected.indices.shape[:-1], -1)
    return Routing(
        torch.cat([weights.new_ones(shared.shape), weights], dim=-1),
        torch.cat([shared, selected.indices + num_shared_experts], dim=-1),
        F.pad(probabilities, (num_shared_experts, 0)),
    )


def expert_counts(
    indices: Int[torch.Tensor, "*batch experts_per_token"], num_experts: int
) -> Int[torch.Tensor, " num_experts"]:
    """Number of the tokens' selections that each expert got."""
    return SparsityPattern(indices, num_experts).starts().diff()


def expert_load(
    indices: Int[torch.Tensor, "*batch experts_per_token"],
    num_experts: int,
    num_shared_experts: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Float[torch.Tensor, " num_routed_experts"]:
    """Share of the router's selections that each expert got that is not shared; sums to 1."""
    counts = expert_counts(indices, num_experts)
    total = indices[..., num_shared_experts:].numel()
    return counts[num_shared_experts:].to(dtype) / total


def load_balance_loss(
    load: Float[torch.Tensor, " num_routed_experts"],
    mean_p: Float[torch.Tensor, " num_routed_experts"],
) -> Float[torch.Tensor, ""]:
    """
    Switch Transformer's balancing term ``N * sum_i f_i P_i`` (equation 2.2).

    It is 1 for a uniform router. Shared experts have no part in it.

    Args:
        load: Share of a batch's selections that each expert got (f), which sums to 1.
        mean_p: Mean probability of each expert (P).

    Returns:
        A scalar, differentiable through the probabilities.
    """
    return len(mean_p) * (load * mean_p).sum()

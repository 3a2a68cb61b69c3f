"""Global TopK over the latents of all experts that a token selected."""

import torch
from jaxtyping import Float, Int

from .types import SparseLatents, TopKOver


def select_topk(
    pre_acts: Float[torch.Tensor, "*batch experts_per_token expert_size"],
    gates: Float[torch.Tensor, "*batch experts_per_token"],
    expert_indices: Int[torch.Tensor, "*batch experts_per_token"],
    k: int,
    topk_over: TopKOver,
) -> SparseLatents:
    """
    Keep each token's ``k`` largest candidates, rectified and gated.

    Equation 2.3 of the Scale SAE paper ranks the candidates themselves
    (``topk_over="activations"``); its authors' code ranks them after the gate
    (``"gated_activations"``). Either way the result is gate times ReLU.

    Args:
        pre_acts: Pre-activations of the candidates,
            ``[..., experts_per_token, expert_size]``.
        gates: Gates of the selected experts, ``[..., experts_per_token]``.
        expert_indices: Selected experts, ``[..., experts_per_token]``.
        k: How many latents to keep; all of them where there are fewer.
        topk_over: What the candidates are ranked by.

    Returns:
        The survivors, ``[..., min(k, experts_per_token * expert_size)]``.
    """
    expert_size = pre_acts.shape[-1]
    candidates = pre_acts.flatten(-2)
    ranking = candidates
    if topk_over == "gated_activations":
        ranking = (pre_acts * gates.unsqueeze(-1)).flatten(-2)
    top = ranking.topk(min(k, ranking.shape[-1]), dim=-1, sorted=False).indices
    slot, offset = top // expert_size, top % expert_size
    # ReLU before the gate: -inf * 0 would be NaN.
    values = candidates.gather(-1, top).relu() * gates.gather(-1, slot)
    indices = expert_indices.gather(-1, slot) * expert_size + offset
    return SparseLatents(values, indices)

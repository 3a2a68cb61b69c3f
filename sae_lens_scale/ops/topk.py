"""Global TopK over the latents of all experts that a token selected."""

import torch
from jaxtyping import Float, Int

from .types import TopKOver


def select_topk(
    pre_acts: Float[torch.Tensor, "*batch experts_per_token expert_size"],
    gates: Float[torch.Tensor, "*batch experts_per_token"],
    k: int,
    topk_over: TopKOver,
    sorted: bool = False,
) -> Int[torch.Tensor, "*batch k"]:
    """
    Find each token's ``k`` largest candidates.

    Equation 2.3 of the Scale SAE paper ranks the candidates themselves
    (``topk_over="activations"``); its authors' code ranks them after the gate
    (``"gated_activations"``).

    Args:
        pre_acts: Pre-activations of the candidates,
            ``[..., experts_per_token, expert_size]``.
        gates: Gates of the selected experts, ``[..., experts_per_token]``.
        k: How many latents to keep; all of them where there are fewer.
        topk_over: What the candidates are ranked by.
        sorted: Whether the largest come first.

    Returns:
        Positions ``slot * expert_size + offset`` among a token's candidates, in any order
        unless ``sorted``, ``[..., min(k, experts_per_token * expert_size)]``.
    """
    ranking = pre_acts
    if topk_over == "gated_activations":
        ranking = pre_acts * gates.unsqueeze(-1)
    ranking = ranking.flatten(-2)
    return ranking.topk(min(k, ranking.shape[-1]), dim=-1, sorted=sorted).indices

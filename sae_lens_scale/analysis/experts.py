"""How much the experts of a mixture are used."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from sae_lens_scale.saes.mixture import MixtureSAE


@dataclass
class ExpertUsage:
    """
    How a router spreads tokens over its experts.

    Attributes:
        counts: How often each expert was selected, ``num_experts`` entries.
        idle_experts: Number of experts that no token selected.
        entropy: Entropy of the selections divided by its maximum: 1 if all experts are
            selected equally often, 0 if it is always the same one.
    """

    counts: list[int]
    idle_experts: int
    entropy: float


@torch.no_grad()
def expert_usage(sae: MixtureSAE, activations: Iterable[torch.Tensor]) -> ExpertUsage:
    """
    Count the experts that an SAE selects for activations.

    Args:
        sae: A Scale or Switch SAE.
        activations: Batches of raw activations of the language model, each
            ``[..., d_in]``.

    Returns:
        Counts over all tokens of all batches.

    Raises:
        ValueError: If there are no tokens.
    """
    num_experts = sae.cfg.num_experts
    counts = torch.zeros(num_experts, dtype=torch.long, device=sae.device)
    for batch in activations:
        indices = sae.route(batch.to(sae.device)).indices
        counts += indices.flatten().bincount(minlength=num_experts)
    if not counts.any():
        raise ValueError("activations must hold at least one token, got none")
    share = counts.double() / counts.sum()
    entropy = torch.special.entr(share).sum().item()
    return ExpertUsage(
        counts=counts.tolist(),
        idle_experts=int((counts == 0).sum()),
        entropy=entropy / math.log(num_experts) if num_experts > 1 else 1.0,
    )

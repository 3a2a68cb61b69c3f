"""Explanation of a text token by token: experts and latents (Appendix B of the Scale SAE paper)."""

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE

from sae_lens_scale.saes.mixture import MixtureSAE
from sae_lens_scale.upstream import HookedSAETransformer

from .contexts import hook_of


@dataclass(frozen=True)
class ActiveLatent:
    """
    A latent that fires on a token.

    Attributes:
        latent: Its index in ``range(d_sae)``.
        expert: The expert that it belongs to.
        activation: Its feature activation, gate included.
    """

    latent: int
    expert: int
    activation: float


@dataclass(frozen=True)
class TokenExplanation:
    """
    Experts and strongest latents of one token.

    Attributes:
        token: The token as text.
        position: Its position in the sequence.
        experts: The experts that it selected, strongest first.
        expert_weights: Their gates.
        latents: Its strongest latents, strongest first.
    """

    token: str
    position: int
    experts: list[int]
    expert_weights: list[float]
    latents: list[ActiveLatent]


@torch.no_grad()
def explain_tokens(
    model: HookedSAETransformer, sae: SAE[Any], text: str, max_latents: int = 8
) -> list[TokenExplanation]:
    """
    Run a text through the model with the SAE spliced in, and read off each token.

    Args:
        model: The language model that the SAE was trained on.
        sae: An SAE whose metadata names its hook. A dense one counts as a single
            expert, whose gate is 1.
        text: The text; the tokenizer's BOS is prepended if the SAE was trained so.
        max_latents: Number of latents listed per token at most.

    Returns:
        One explanation per token, the BOS excluded.

    Raises:
        ValueError: If the SAE's metadata names no hook, or one that the model lacks;
            if ``max_latents`` is negative.
    """
    if max_latents < 0:
        raise ValueError(f"max_latents must be at least 0, got {max_latents}")
    hook_name = hook_of(model, sae)
    prepend_bos = bool(sae.cfg.metadata.prepend_bos)
    tokens = model.to_tokens(text, prepend_bos=prepend_bos)
    names = ["hook_sae_acts_post", "hook_expert_weights", "hook_expert_indices"]
    _, cache = model.run_with_cache_with_saes(
        tokens,
        saes=[sae],
        # Hooks that are d_sae wide and not needed would cost as much as the activations.
        names_filter=[f"{hook_name}.{name}" for name in names],
    )
    acts = cache[f"{hook_name}.hook_sae_acts_post"][0]
    if isinstance(sae, MixtureSAE):
        expert_size = sae.cfg.expert_size
        weights = cache[f"{hook_name}.hook_expert_weights"][0]
        indices = cache[f"{hook_name}.hook_expert_indices"][0]
    else:
        expert_size = sae.cfg.d_sae
        weights = torch.ones(len(acts), 1)
        indices = torch.zeros(len(acts), 1, dtype=torch.long)
    words = model.to_str_tokens(tokens[0])
    explanations = []
    for position in range(int(prepend_bos), len(words)):
        top = acts[position].topk(min(max_latents, acts.shape[-1]))
        explanations.append(
            TokenExplanation(
                token=str(words[position]),
                position=position,
                experts=indices[position].tolist(),
                expert_weights=weights[position].tolist(),
                latents=[
                    ActiveLatent(latent, latent // expert_size, activation)
                    for activation, latent in zip(
                        top.values.tolist(), top.indices.tolist(), strict=True
                    )
                    if activation > 0
                ],
            )
        )
    return explanations

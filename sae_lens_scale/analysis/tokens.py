"""Explanation of a text token by token: experts and latents (Appendix B of the Scale SAE paper)."""

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE

from sae_lens_scale.saes.mixture import MixtureSAE

from .activations import (
    encode_in_parts,
    heads_are_joined,
    hook_activations,
    require_finite,
)
from .corpus import require_integer
from .language_model import (
    LanguageModel,
    hook_of,
    text_ids,
    token_strings,
)


@dataclass(frozen=True)
class ActiveLatent:
    """
    A latent that fires on a token.

    Attributes:
        latent: Its index in ``range(d_sae)``.
        expert: The expert that it belongs to; one that the token did not select, where a
            hook has turned the latent up.
        activation: Its feature activation, gate included; negative if it fires so.
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
        latents: Its strongest latents, those of the largest magnitude first.
    """

    token: str
    position: int
    experts: list[int]
    expert_weights: list[float]
    latents: list[ActiveLatent]


@torch.no_grad()
def explain_tokens(
    model: LanguageModel, sae: SAE[Any], text: str, max_latents: int = 8
) -> list[TokenExplanation]:
    """
    Run a text through the model up to the SAE's hook, and read off each token.

    Hooks on the SAE see, and may edit, what it computes.

    Args:
        model: The language model that the SAE was trained on, as for
            :func:`.top_activating_contexts`.
        sae: An SAE or transcoder whose metadata names its hook. A dense one counts as a
            single expert, whose gate is 1.
        text: The text; the tokenizer's BOS is prepended if the SAE was trained so.
        max_latents: Number of latents listed per token at most.

    Returns:
        One explanation per token, the BOS excluded.

    Raises:
        ValueError: If the SAE's metadata names no hook, or one that the model lacks; if
            the text is none, has no tokens or more than the model's context; if
            ``max_latents`` is negative; if activations are NaN or infinite.
    """
    max_latents = require_integer("max_latents", max_latents, 0)
    hook = hook_of(model, sae)
    bos, ids = text_ids(model, sae, text)
    x = hook_activations(model, sae, hook, torch.tensor([bos + ids], device="cpu"))
    top = []
    for acts in encode_in_parts(sae, x):
        # One at least, which shows whether activations are finite.
        latents = acts.abs().topk(min(max(1, max_latents), sae.cfg.d_sae)).indices
        top.append((acts.gather(1, latents).cpu(), latents.cpu()))
    activations, latents = (torch.cat(parts) for parts in zip(*top, strict=True))
    positions = range(len(bos), len(bos) + len(ids))
    is_bos = torch.arange(positions.stop, device="cpu") < positions.start
    require_finite("activations", activations, 0, is_bos)
    if isinstance(sae, MixtureSAE):
        expert_size = sae.cfg.expert_size
        with heads_are_joined(sae):
            routing = sae.route(x[0].to(sae.device))
        experts, weights = routing.indices.tolist(), routing.weights.tolist()
    else:
        expert_size = sae.cfg.d_sae
        experts = [[0] for _ in range(positions.stop)]
        weights = [[1.0] for _ in range(positions.stop)]
    return [
        TokenExplanation(
            token=token,
            position=i,
            experts=experts[i],
            expert_weights=weights[i],
            latents=[
                ActiveLatent(latent, latent // expert_size, activation)
                for activation, latent in zip(
                    activations[i, :max_latents].tolist(),
                    latents[i, :max_latents].tolist(),
                    strict=True,
                )
                if activation != 0
            ],
        )
        for i, token in zip(positions, token_strings(model, ids), strict=True)
    ]

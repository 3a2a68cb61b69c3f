"""Latents, experts and gates of each token of a corpus, compactly."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_lens_scale.analysis.activations import (
    encode_sparsely,
    heads_are_joined,
    hook_activations,
    require_finite,
)
from sae_lens_scale.analysis.language_model import LanguageModel, hook_of
from sae_lens_scale.saes.mixture import MixtureSAE

# Bytes of one token in the page before compression, which about makes up for base64: its id
# and number of latents; of one latent that fires on it, or one expert: index and strength.
_BYTES_PER_TOKEN = 3
_BYTES_PER_ENTRY = 3
_MAX_BYTES = 50_000_000


@dataclass(frozen=True)
class ActiveLatents:
    """
    Latents that fire on the tokens of some passages. All tensors are on the CPU.

    Attributes:
        lengths: Number of tokens of each passage, ``[passages]``.
        ids: Token ids, passage after passage, ``[tokens]``.
        counts: Number of latents that fire on each token, ``[tokens]``; 0 on excluded ones.
        latents: These latents, token after token, ``[firings]``.
        activations: Their feature activations, ``[firings]``, float32.
        experts: Experts that each token selected, ``[tokens, experts_per_token]``; of
            width 0 for an SAE without experts.
        gates: Their gates, of the same shape, float32.
    """

    lengths: torch.Tensor
    ids: torch.Tensor
    counts: torch.Tensor
    latents: torch.Tensor
    activations: torch.Tensor
    experts: torch.Tensor
    gates: torch.Tensor


@torch.no_grad()
def find_active_latents(
    model: LanguageModel,
    sae: SAE[Any],
    batches: Iterable[torch.Tensor],
    excluded: torch.Tensor,
    total: int | None,
    verbose: bool,
) -> ActiveLatents:
    """
    Run a language model and an SAE over a corpus.

    Args:
        model: The language model.
        sae: The SAE; a mixture or any other.
        batches: Token ids, each ``[passages, tokens]``; at least one batch.
        excluded: Ids of tokens that fire nothing.
        total: Number of batches, for the progress bar; None if it is not known.
        verbose: Show a progress bar.

    Raises:
        ValueError: If there are more batches than fit on a page; as for :func:`.explorer`.
    """
    found: list[ActiveLatents] = []
    hook = hook_of(model, sae)
    tokens = size = 0
    for i, ids in enumerate(
        tqdm(batches, desc="Explorer", total=total, disable=not verbose)
    ):
        found.append(_of_batch(model, sae, hook, ids, excluded, i))
        tokens += ids.numel()
        entries = found[-1].latents.numel() + found[-1].experts.numel()
        size += _BYTES_PER_TOKEN * ids.numel() + _BYTES_PER_ENTRY * entries
        if size > _MAX_BYTES:
            raise ValueError(
                f"tokens must be fewer: {tokens:,} of them make a page of more than "
                f"{_MAX_BYTES // 10**6} MB"
            )
    return ActiveLatents(
        *(
            torch.cat([getattr(one, field.name) for one in found])
            for field in fields(ActiveLatents)
        )
    )


def _of_batch(
    model: LanguageModel,
    sae: SAE[Any],
    hook: str,
    ids: torch.Tensor,
    excluded: torch.Tensor,
    batch: int,
) -> ActiveLatents:
    x = hook_activations(model, sae, hook, ids)
    ids = ids.cpu()
    ignored = torch.isin(ids, excluded)
    finite, counts, latents, activations = (
        torch.cat(parts)
        for parts in zip(*_firings(sae, x, ignored.flatten()), strict=True)
    )
    # As require_finite takes them: a row a token.
    rows = torch.where(finite, 0.0, torch.nan).view(*ids.shape, 1)
    require_finite("activations", rows, batch, ignored)
    experts = latents.new_zeros(ids.numel(), 0)
    gates = activations.new_zeros(ids.numel(), 0)
    if isinstance(sae, MixtureSAE):
        with heads_are_joined(sae):
            routing = sae.route(x.flatten(0, 1).to(sae.device))
        experts, gates = routing.indices.cpu(), routing.weights.float().cpu()
    return ActiveLatents(
        lengths=torch.full((len(ids),), ids.shape[1], device="cpu"),
        ids=ids.flatten(),
        counts=counts,
        latents=latents,
        activations=activations,
        experts=experts,
        gates=gates,
    )


def _firings(
    sae: SAE[Any], x: torch.Tensor, ignored: torch.Tensor
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield, part by part, which tokens are finite, and counts, latents and activations."""
    first = 0
    for finite, found in encode_sparsely(sae, x):
        part = slice(first, first + len(finite))
        first = part.stop
        values = found.values.float().cpu()
        values = values.masked_fill(ignored[part].unsqueeze(-1), 0)
        fires = values != 0
        yield (
            finite.cpu(),
            fires.sum(dim=-1),
            found.indices.cpu()[fires],
            values[fires],
        )

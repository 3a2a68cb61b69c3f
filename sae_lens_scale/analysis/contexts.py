"""Passages of a corpus that fire latents most (MaxAct, Appendix A.3 of the Scale SAE paper)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sae_lens import SAE
from tqdm.auto import tqdm

from .activations import encode_in_parts, hook_activations, require_finite
from .corpus import (
    Tokens,
    chosen_latents,
    excluded_ids,
    require_integer,
    token_batches,
)
from .language_model import LanguageModel, hook_of, token_strings, tokenizer_of

# Placeholder in a window that reaches beyond its passage.
_NO_TOKEN = -1


@dataclass(frozen=True)
class Context:
    """
    A passage around the token that fires a latent most in it.

    Attributes:
        activation: The latent's feature activation on that token, gate included; negative
            if it fires so.
        passage: Index of the passage in the corpus, from 0.
        position: Position of that token in the passage, from 0.
        tokens: The tokens around it as text, itself included.
        activations: Feature activations on each of them; 0 on excluded tokens.
        peak: Index of that token in ``tokens``.
    """

    activation: float
    passage: int
    position: int
    tokens: list[str]
    activations: list[float]
    peak: int


@dataclass(frozen=True)
class LatentContexts:
    """
    Strongest contexts of a latent.

    Attributes:
        latent: Its index in ``range(d_sae)``.
        contexts: Its strongest contexts, strongest first, one per passage; fewer than
            asked for, or none, if it fires in fewer passages.
    """

    latent: int
    contexts: list[Context]


@torch.no_grad()
def top_activating_contexts(
    model: LanguageModel,
    sae: SAE[Any],
    tokens: Tokens,
    latents: Iterable[int],
    *,
    n: int = 10,
    window: int = 10,
    max_batches: int | None = None,
    exclude_special_tokens: bool | Iterable[int] = True,
    verbose: bool = True,
) -> list[LatentContexts]:
    """
    Find the passages that fire each of some latents most, in one pass over a corpus.

    A passage is a row of a batch of tokens, and counts once for a latent, with the
    token that fires it most: that of the largest activation, by magnitude where an SAE
    has negative ones. Of equal activations the earlier one in the corpus wins,
    however the corpus is divided into batches. Memory grows with ``len(latents) * n``
    and with a batch, not with the corpus.

    Args:
        model: The language model that the SAE was trained on: a HookedTransformer, a
            SAETransformerBridge, or a Hugging Face model of ``sae_lens.load_model``.
        sae: A mixture or any other SAE or transcoder of SAELens, its normalisation folded
            in, whose metadata names its hook.
        tokens: Batches of token ids, each ``[passages, tokens]`` and unpadded, as a
            tensor, an array or nested lists; or a store of SAELens, which is read from
            where it stands to the end of its data set, but for the last, incomplete batch.
        latents: Indices in ``range(d_sae)``.
        n: Number of passages to keep for each latent.
        window: Number of tokens to keep on either side of the strongest, inside the
            passage.
        max_batches: Stop after so many batches.
        exclude_special_tokens: Ids of tokens that do not count; ``True`` for the
            tokenizer's BOS, EOS and their like, as in SAELens's evaluation.
        verbose: Show a progress bar.

    Returns:
        One entry per latent, in the order of ``latents``.

    Raises:
        ValueError: If a latent is out of range or there twice, or there is none; if
            ``n``, ``window`` or ``max_batches`` is too small; if the SAE's metadata
            names no hook of the model, or it lacks a tokenizer; if ``tokens`` are not
            such batches, are longer than the model's context, or there are none; if
            activations at the hook, or of any of the SAE's latents, are NaN or infinite on
            a token that is not excluded.
    """
    n = require_integer("n", n, 1)
    window = require_integer("window", window, 0)
    latents = chosen_latents(latents, sae.cfg.d_sae)
    tokenizer_of(model, "the text of contexts")
    stream = latent_activations(
        model, sae, tokens, latents, max_batches, exclude_special_tokens
    )
    best: dict[str, torch.Tensor] = {}
    passages = 0
    for ids, acts in tqdm(
        stream, desc="Contexts", total=max_batches, disable=not verbose
    ):
        found = _strongest_of_batch(ids, acts, passages, n, window)
        passages += len(ids)
        best = _strongest(_joined(best, found) if best else found, n)
    if not best:
        raise ValueError("tokens must hold at least one batch, got none")
    hits = (best["activation"] != 0).sum(dim=1).tolist()
    return [
        LatentContexts(latent, [_context(model, best, i, j) for j in range(hits[i])])
        for i, latent in enumerate(latents)
    ]


def _strongest_of_batch(
    ids: torch.Tensor, acts: torch.Tensor, first_passage: int, n: int, window: int
) -> dict[str, torch.Tensor]:
    """Find each latent's strongest passages in a batch; tensors ``[latents, passages, ...]``."""
    # argmax, unlike max, is known to return the first of equals.
    positions = acts.abs().argmax(dim=1)
    peaks = acts.gather(1, positions[:, None]).squeeze(1)
    rows = peaks.abs().sort(dim=0, descending=True, stable=True).indices[:n].T
    columns = torch.arange(acts.shape[2], device=acts.device)[:, None]
    positions = positions[rows, columns]
    # No window reaches farther than from one end of a passage to the other.
    reach = min(window, ids.shape[1] - 1)
    offsets = torch.arange(-reach, reach + 1, device=acts.device)
    around = positions[..., None] + offsets
    inside = (around >= 0) & (around < ids.shape[1])
    around = around.clamp(0, ids.shape[1] - 1)
    return {
        "activation": peaks[rows, columns],
        "passage": rows + first_passage,
        "position": positions,
        "tokens": ids[rows[..., None], around].where(inside, _NO_TOKEN),
        "activations": acts[rows[..., None], around, columns[..., None]],
    }


def _joined(
    best: dict[str, torch.Tensor], found: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Put passages of two batches side by side, in windows as wide as the wider ones."""
    width = max(one["tokens"].shape[2] for one in (best, found))
    sides = [_widened(one, width) for one in (best, found)]
    return {name: torch.cat([one[name] for one in sides], dim=1) for name in best}


def _widened(found: dict[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    margin = (width - found["tokens"].shape[2]) // 2
    return {
        **found,
        "tokens": F.pad(found["tokens"], (margin, margin), value=_NO_TOKEN),
        "activations": F.pad(found["activations"], (margin, margin)),
    }


def _strongest(found: dict[str, torch.Tensor], n: int) -> dict[str, torch.Tensor]:
    order = found["activation"].abs().sort(dim=1, descending=True, stable=True).indices
    latents = torch.arange(len(order), device=order.device)[:, None]
    return {k: v[latents, order[:, :n]] for k, v in found.items()}


def _context(
    model: LanguageModel, best: dict[str, torch.Tensor], latent: int, hit: int
) -> Context:
    ids = best["tokens"][latent, hit]
    inside = ids != _NO_TOKEN
    return Context(
        activation=best["activation"][latent, hit].item(),
        passage=int(best["passage"][latent, hit]),
        position=int(best["position"][latent, hit]),
        tokens=token_strings(model, ids[inside]),
        activations=best["activations"][latent, hit][inside].tolist(),
        peak=int(inside[: len(ids) // 2].sum()),
    )


@torch.no_grad()
def latent_activations(
    model: LanguageModel,
    sae: SAE[Any],
    tokens: Tokens,
    latents: Iterable[int],
    max_batches: int | None = None,
    exclude_special_tokens: bool | Iterable[int] = True,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """
    Stream the feature activations of chosen latents over a corpus.

    Takes the arguments of :func:`top_activating_contexts` and raises its errors, when the
    first batch is asked for.

    Yields:
        For each batch its token ids, ``[passages, tokens]``, and activations,
        ``[passages, tokens, len(latents)]`` in float32 and 0 on excluded tokens, both on
        the CPU.
    """
    hook = hook_of(model, sae)
    chosen = torch.tensor(chosen_latents(latents, sae.cfg.d_sae), device=sae.device)
    excluded = excluded_ids(model, exclude_special_tokens)
    for i, ids in enumerate(token_batches(tokens, max_batches)):
        x = hook_activations(model, sae, hook, ids)
        parts = [part[:, chosen].float().cpu() for part in encode_in_parts(sae, x)]
        acts = torch.cat(parts).view(*ids.shape, len(chosen))
        ids = ids.cpu()
        ignored = torch.isin(ids, excluded)
        require_finite("activations", acts, i, ignored)
        acts[ignored] = 0
        yield ids, acts

"""The explorer page: made from a language model, an SAE and a corpus."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from sae_lens import SAE

from sae_lens_scale.analysis.autointerp.results import Interpretability, QuantileScores
from sae_lens_scale.analysis.corpus import Tokens, excluded_ids, token_batches
from sae_lens_scale.analysis.experts import scaling_factors
from sae_lens_scale.analysis.language_model import (
    LanguageModel,
    hook_of,
    text_ids,
    token_strings,
)
from sae_lens_scale.saes.mixture import MixtureSAE

from .active_latents import ActiveLatents, find_active_latents
from .directions import Directions, directions_of
from .html import pack, page

# Steps from 0 to a latent's largest activation, to the largest gate of all, and to a cosine of 1. The
# browser's histograms have 25 bars, each of equally many steps of activations. Gates have more steps
# because the largest, often that of a BOS, can be far from all others.
_STEPS = 250
_SIGNED_STEPS = 125
_GATE_STEPS = 2**15 - 1
_COSINE_STEPS = 10_000


@torch.no_grad()
def explorer(
    model: LanguageModel,
    sae: SAE[Any],
    tokens: Tokens,
    *,
    prompts: Sequence[str] = (),
    interpretability: Interpretability | None = None,
    max_batches: int | None = None,
    exclude_special_tokens: bool | Iterable[int] = True,
    verbose: bool = True,
) -> str:
    """
    Make a page to explore an SAE with: experts, their latents, the contexts that fire them,
    and the tokens of these.

    The page holds the activations of all latents on all tokens, and counts, ranks and
    searches in the browser. It loads nothing from a network. Memory and the page grow with
    the number of tokens: about 120 bytes for each at k 32 and 16 experts per token.

    Args:
        model: The language model that the SAE was trained on: a HookedTransformer, a
            SAETransformerBridge, or a Hugging Face model of ``sae_lens.load_model``.
        sae: A mixture or any other SAE or transcoder of SAELens, its normalisation folded
            in, whose metadata names its hook.
        tokens: Batches of token ids, as for :func:`.top_activating_contexts`.
        prompts: Texts to show beside the corpus; they do not count in its statistics.
        interpretability: Result of ``autointerp``, whose explanations the page shows.
        max_batches: Stop after so many batches.
        exclude_special_tokens: Ids of tokens that do not count; ``True`` for the
            tokenizer's BOS, EOS and their like, as in SAELens's evaluation.
        verbose: Show progress bars.

    Returns:
        The page, HTML in one piece; it is at most about 50 MB long.

    Raises:
        ValueError: If the tokens would make a longer page, or fire no latent at all; if a
            prompt has no tokens; if the metadata's omegas are not one for each expert; as for
            :func:`.top_activating_contexts`.
    """
    # Before long work.
    hook_of(model, sae)
    facts = _facts(sae)
    read = [sum(text_ids(model, sae, text), []) for text in prompts]
    excluded = excluded_ids(model, exclude_special_tokens)
    total = None if max_batches is None else max_batches + len(read)
    found = find_active_latents(
        model,
        sae,
        chain(
            (torch.tensor([ids], device="cpu") for ids in read),
            _batches(tokens, max_batches),
        ),
        excluded,
        total,
        verbose,
    )
    # Those of prompts, which come first, do not count.
    if not found.counts[sum(map(len, read)) :].any():
        raise ValueError("tokens must fire at least one latent of the SAE, got none")
    alive, rows = found.latents.unique(return_inverse=True)
    directions = directions_of(model, sae, alive, verbose)
    vocabulary = torch.cat(
        [found.ids, directions.promoted.flatten(), directions.suppressed.flatten()]
    ).unique()
    facts |= {
        "num_prompts": len(read),
        "strings": token_strings(model, vocabulary),
        "excluded": torch.isin(vocabulary, excluded).nonzero().flatten().tolist(),
        "explanations": _explanations(interpretability),
    }
    arrays, scales = _arrays(found, alive, rows, directions, vocabulary)
    return page(facts | scales, arrays)


def _batches(tokens: Tokens, max_batches: int | None) -> Iterator[torch.Tensor]:
    """Read the corpus, of which there has to be something, whatever else there is."""
    batches = token_batches(tokens, max_batches)
    try:
        yield next(batches)
    except StopIteration:
        raise ValueError("tokens must hold at least one batch, got none") from None
    yield from batches


def _facts(sae: SAE[Any]) -> dict[str, Any]:
    """Describe the SAE."""
    cfg, metadata = sae.cfg, sae.cfg.metadata
    facts = {
        "architecture": cfg.architecture(),
        "d_sae": cfg.d_sae,
        "num_experts": 1,
        "num_shared_experts": 0,
        "omega": None,
        "hook_name": metadata.hook_name,
        "model_name": metadata.model_name,
        "neuronpedia_id": metadata.neuronpedia_id,
        "config": {
            # As text, which may be "nan".
            name: str(value)
            for name, value in cfg.to_dict().items()
            if isinstance(value, (str, int, float, bool)) and name != "device"
        },
    }
    if isinstance(sae, MixtureSAE):
        facts |= {
            "num_experts": cfg.num_experts,
            "num_shared_experts": cfg.num_shared_experts,
            "omega": _omega(sae),
        }
    return facts


def _omega(sae: MixtureSAE[Any]) -> list[float] | None:
    """Omega of each expert, or None if the SAE has none."""
    if getattr(sae, "omega", None) is None and sae.cfg.metadata.omega is None:
        return None
    return scaling_factors(sae)


def _explanations(found: Interpretability | None) -> dict[int, dict[str, Any]]:
    if found is None:
        return {}
    return {
        one.latent: {
            "text": one.explanation,
            "detection": _accuracy(one.detection),
            "fuzzing": _accuracy(one.fuzzing),
        }
        for one in found.latents
    }


def _accuracy(scores: QuantileScores) -> float | None:
    answered = sum(scores.answered)
    return sum(scores.correct) / answered if answered else None


def _arrays(
    found: ActiveLatents,
    alive: torch.Tensor,
    rows: torch.Tensor,
    directions: Directions,
    vocabulary: torch.Tensor,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Arrays of the page, quantised, and what turns them into numbers again."""
    magnitudes = found.activations.abs()
    largest = magnitudes.new_zeros(len(alive)).scatter_reduce(
        0, rows, magnitudes, "amax"
    )
    # Negative ones take half of the steps.
    steps = _SIGNED_STEPS if (found.activations < 0).any() else _STEPS
    # At least one step: a latent that fires stays apart from a silent one.
    strength = (magnitudes / largest[rows] * steps).round().clamp(1, steps)
    largest_gate = found.gates.abs().max().item() if found.gates.numel() else 0.0
    gate_step = (largest_gate or 1.0) / _GATE_STEPS
    at = {
        name: torch.searchsorted(vocabulary, ids)
        for name, ids in (
            ("tokens", found.ids),
            ("promoted", directions.promoted),
            ("suppressed", directions.suppressed),
        )
    }
    tokens = torch.arange(len(found.ids), device="cpu").repeat_interleave(found.counts)
    order = (tokens * len(alive) + rows).argsort(stable=True)
    rows = rows[order]
    # A token's latents in ascending order, each as its distance from the one before, or from
    # 0: half as long as their indices, once compressed.
    is_first = tokens.diff(prepend=tokens.new_full((1,), -1)) > 0
    gaps = torch.where(is_first, rows, rows.diff(prepend=rows.new_zeros(1)))
    arrays = {
        "lengths": found.lengths,
        "counts": found.counts,
        "gaps": gaps,
        "strengths": (strength * found.activations.sign()).long()[order],
        "experts": found.experts,
        "gates": (found.gates / gate_step).round().long(),
        "alive": alive,
        "largest": largest,
        "nearest": directions.nearest,
    } | at
    for name in ("cosines", "within", "between"):
        arrays[name] = (getattr(directions, name) * _COSINE_STEPS).round().long()
    scales = {"steps": steps, "gate_step": gate_step, "cosine_steps": _COSINE_STEPS}
    return {name: pack(array) for name, array in arrays.items()}, scales

"""Passages of a corpus that fire latents most (MaxAct, Appendix A.3 of the Scale SAE paper)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import (
    extract_stop_at_layer_from_tlens_hook_name,
    get_special_token_ids,
)
from tqdm.auto import tqdm

from sae_lens_scale.upstream import HookedTransformer

# Source of token ids.
Tokens = ActivationsStore | Iterable[torch.Tensor]

# Feature activations that exist at a time while a batch is encoded: 256 MiB in float32.
_MAX_ACTIVATIONS = 2**26
# Placeholder in a window that reaches beyond its passage.
_NO_TOKEN = -1


@dataclass(frozen=True)
class Context:
    """
    A passage around the token that fires a latent most in it.

    Attributes:
        activation: The latent's feature activation on that token, gate included.
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
    model: HookedTransformer,
    sae: SAE[Any],
    tokens: Tokens,
    latents: Sequence[int],
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
    token that fires it most. Of equal activations the earlier one in the corpus wins,
    however the corpus is divided into batches. Memory grows with ``len(latents) * n``
    and with a batch, not with the corpus.

    Args:
        model: The language model that the SAE was trained on.
        sae: A mixture or any other SAE of SAELens, its normalisation folded in, whose
            metadata names its hook.
        tokens: Batches of token ids, each ``[passages, tokens]`` and unpadded; or a
            store of SAELens, which is read from where it stands to the end of its data
            set, but for the last, incomplete batch.
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
            names no hook of the model; if ``tokens`` are not such batches, or there
            are none.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if window < 0:
        raise ValueError(f"window must be at least 0, got {window}")
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
        if best:
            found = {k: torch.cat([best[k], v], dim=1) for k, v in found.items()}
        best = _strongest(found, n)
    if not best:
        raise ValueError("tokens must hold at least one batch, got none")
    hits = (best["activation"] > 0).sum(dim=1).tolist()
    return [
        LatentContexts(
            int(latent), [_context(model, best, i, j) for j in range(hits[i])]
        )
        for i, latent in enumerate(latents)
    ]


def _strongest_of_batch(
    ids: torch.Tensor, acts: torch.Tensor, first_passage: int, n: int, window: int
) -> dict[str, torch.Tensor]:
    """Find each latent's strongest passages in a batch; tensors ``[latents, passages, ...]``."""
    # argmax, unlike max, is known to return the first of equals.
    positions = acts.argmax(dim=1)
    peaks = acts.gather(1, positions[:, None]).squeeze(1)
    rows = peaks.sort(dim=0, descending=True, stable=True).indices[:n].T
    columns = torch.arange(acts.shape[2])[:, None]
    positions = positions[rows, columns]
    around = positions[..., None] + torch.arange(-window, window + 1)
    inside = (around >= 0) & (around < ids.shape[1])
    around = around.clamp(0, ids.shape[1] - 1)
    return {
        "activation": peaks[rows, columns],
        "passage": rows + first_passage,
        "position": positions,
        "tokens": ids[rows[..., None], around].where(inside, _NO_TOKEN),
        "activations": acts[rows[..., None], around, columns[..., None]],
    }


def _strongest(found: dict[str, torch.Tensor], n: int) -> dict[str, torch.Tensor]:
    order = found["activation"].sort(dim=1, descending=True, stable=True).indices
    latents = torch.arange(len(order))[:, None]
    return {k: v[latents, order[:, :n]] for k, v in found.items()}


def _context(
    model: HookedTransformer, best: dict[str, torch.Tensor], latent: int, hit: int
) -> Context:
    ids = best["tokens"][latent, hit]
    inside = ids != _NO_TOKEN
    return Context(
        activation=best["activation"][latent, hit].item(),
        passage=int(best["passage"][latent, hit]),
        position=int(best["position"][latent, hit]),
        tokens=list(map(str, model.to_str_tokens(ids[inside]))),
        activations=best["activations"][latent, hit][inside].tolist(),
        peak=int(inside[: len(ids) // 2].sum()),
    )


@torch.no_grad()
def latent_activations(
    model: HookedTransformer,
    sae: SAE[Any],
    tokens: Tokens,
    latents: Sequence[int],
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
    hook_name = hook_of(model, sae)
    chosen = _checked_latents(latents, sae.cfg.d_sae).to(sae.device)
    excluded = excluded_ids(model, exclude_special_tokens)
    head = sae.cfg.metadata.hook_head_index
    device = next(model.parameters()).device
    for batch in token_batches(tokens, max_batches):
        _, cache = model.run_with_cache(
            batch.to(device),
            names_filter=hook_name,
            stop_at_layer=extract_stop_at_layer_from_tlens_hook_name(hook_name),
        )
        x = cache[hook_name]
        x = x[:, :, head] if head is not None else x.flatten(2)
        acts = _activations_of(sae, x.flatten(0, 1), chosen).view(
            *batch.shape, len(chosen)
        )
        batch = batch.cpu()
        acts[torch.isin(batch, excluded)] = 0
        yield batch, acts


def _activations_of(
    sae: SAE[Any], x: torch.Tensor, latents: torch.Tensor
) -> torch.Tensor:
    """Encode ``x [tokens, d_in]`` in parts, and keep the activations of some latents."""
    parts = []
    with heads_are_joined(sae):
        for part in x.split(max(1, _MAX_ACTIVATIONS // sae.cfg.d_sae)):
            acts = sae.encode(part.to(sae.device)).to_dense()
            parts.append(acts[:, latents].float().cpu())
    return torch.cat(parts)


@contextmanager
def heads_are_joined(sae: SAE[Any]) -> Iterator[None]:
    """Let an SAE of hook_z take activations whose heads are joined already."""
    joins_heads = sae.hook_z_reshaping_mode
    if joins_heads:
        sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        if joins_heads:
            sae.turn_on_forward_pass_hook_z_reshaping()


def token_batches(tokens: Tokens, max_batches: int | None) -> Iterator[torch.Tensor]:
    """
    Read batches of token ids, from tokens as :func:`top_activating_contexts` takes them.

    Raises:
        ValueError: If ``max_batches`` is less than 1 or a batch has another shape.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, got {max_batches}")
    # A store iterates over activations.
    batches = _store_batches(tokens) if isinstance(tokens, ActivationsStore) else tokens
    for batch in islice(batches, max_batches):
        if batch.ndim != 2 or not batch.numel() or batch.is_floating_point():
            raise ValueError(
                "tokens must be batches of token ids [passages, tokens], got "
                f"{batch.dtype} of shape {tuple(batch.shape)}"
            )
        yield batch


def _store_batches(store: ActivationsStore) -> Iterator[torch.Tensor]:
    while True:
        try:
            yield store.get_batch_tokens(raise_at_epoch_end=True)
        except StopIteration:
            return


def hook_of(model: HookedTransformer, sae: SAE[Any]) -> str:
    """
    Find the model's name for the hook that an SAE was trained on.

    Raises:
        ValueError: If the SAE's metadata names no hook, or one that the model lacks.
    """
    hook_name = sae.cfg.metadata.hook_name
    if hook_name not in model.hook_dict:
        raise ValueError(
            f"sae.cfg.metadata.hook_name must be a hook of the model, got {hook_name!r}"
        )
    # A bridge may have another name, under which it caches the hooks of a spliced SAE.
    resolve = getattr(model, "get_sae_hook_name", None)
    return resolve(sae, "").removesuffix(".") if resolve else hook_name


def excluded_ids(
    model: HookedTransformer, exclude_special_tokens: bool | Iterable[int]
) -> torch.Tensor:
    """
    Look up the token ids, int64, that SAELens's ``exclude_special_tokens`` stands for.

    ``True`` is for the tokenizer's BOS, EOS and their like, ``False`` for none; otherwise
    these are the ids themselves.

    Raises:
        ValueError: If the tokenizer is asked for and the model has none.
    """
    if exclude_special_tokens is True:
        if model.tokenizer is None:
            raise ValueError(
                "exclude_special_tokens=True needs a model with a tokenizer, got none"
            )
        exclude_special_tokens = get_special_token_ids(model.tokenizer)
    return torch.tensor(list(exclude_special_tokens or []), dtype=torch.long)


def _checked_latents(latents: Sequence[int], d_sae: int) -> torch.Tensor:
    chosen = torch.tensor(list(latents), dtype=torch.long)
    if not len(chosen) or len(chosen.unique()) < len(chosen):
        raise ValueError(
            f"latents must name at least one latent and none twice, got {chosen.tolist()}"
        )
    if chosen.min() < 0 or chosen.max() >= d_sae:
        raise ValueError(f"latents must be in range({d_sae}), got {chosen.tolist()}")
    return chosen

"""
Caching of activations, which are computed once for all the SAEs that train on them.

The package writes them: of the splits of a grid's text here, of a run's text for its users.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name

from sae_lens_scale.analysis.corpus import excluded_ids
from sae_lens_scale.cache.manifest import read_manifest, versions, write_manifest
from sae_lens_scale.cache.writing import write_shards
from sae_lens_scale.loading.language_model import fast_bfloat16, load_language_model
from sae_lens_scale.upstream import HookedSAETransformer, buffer_argument

from .activations import (
    ActivationCache,
    CacheSettings,
    Split,
    SplitSettings,
)
from .text import load_text


def cache_activations(
    settings: CacheSettings,
    folder: str | Path,
    *,
    model: HookedSAETransformer | None = None,
    texts: Mapping[Split, Dataset | IterableDataset] | None = None,
    prompts_per_batch: int = 16,
    device: str = "cpu",
) -> ActivationCache:
    """
    Run the language model, and keep its activations in bfloat16 and the tokens they are of.

    Shards that exist are not computed again: after an interruption it goes on with the
    next shard, and a finished cache can be made longer. Special tokens are left out, as in
    training with ``exclude_special_tokens``.

    Args:
        folder: Folder of the cache.
        model: The language model, by default loaded by its name when it is needed.
        texts: The texts, likewise.
        prompts_per_batch: Contexts that the model reads at once.

    Raises:
        ValueError: If the folder holds something else, or a text is too short.
    """
    for name, split in settings.splits().items():
        path = Path(folder, name)
        manifest = read_manifest(path)
        if manifest is not None:
            split.require_fit(path, manifest)
            if manifest["tokens"] >= split.tokens:
                continue
        if model is None:
            model = load_language_model(settings.model, device)
        text = (texts or {}).get(name) or load_text(split.text, split.text_split)
        _cache_split(split, path, model, text, prompts_per_batch, device)
    return ActivationCache.open(folder, settings)


def _cache_split(
    split: SplitSettings,
    folder: Path,
    model: HookedSAETransformer,
    text: Dataset | IterableDataset,
    prompts_per_batch: int,
    device: str,
) -> None:
    excluded = excluded_ids(model, True)
    known = read_manifest(folder) or {}
    manifest = {
        **asdict(split),
        "tokens": 0,
        "dtype": "bfloat16",
        # A cache that was begun on another machine goes on as it began.
        "autocast_lm": known.get("autocast_lm", True)
        if known
        else fast_bfloat16(device),
        "d_in": _width(model, split.hook_name),
        "excluded_token_ids": excluded.tolist(),
        "versions": versions(),
    }
    if not known:
        write_manifest(folder, manifest)
    store = token_store(
        model,
        text,
        split.hook_name,
        split.context_size,
        manifest["d_in"],
        manifest["autocast_lm"],
        excluded,
    )
    tokens = write_shards(store, folder, split.tokens, prompts_per_batch)
    if tokens < split.tokens:
        raise ValueError(
            f"{split.text} ({split.text_split}) ends after {tokens:,} tokens, but "
            f"{split.tokens:,} are wanted"
        )
    write_manifest(folder, {**manifest, "tokens": tokens})


def _width(model: HookedSAETransformer, hook_name: str) -> int:
    if hook_name not in model.hook_dict:
        raise ValueError(f"hook_name must be a hook of the model, got {hook_name!r}")
    _, cache = model.run_with_cache(
        torch.zeros(1, 2, dtype=torch.long, device=model.cfg.device),
        names_filter=[hook_name],
        stop_at_layer=extract_stop_at_layer_from_tlens_hook_name(hook_name),
        prepend_bos=False,
    )
    return cache[hook_name].shape[2:].numel()


def token_store(
    model: HookedSAETransformer,
    text: Dataset | IterableDataset,
    hook_name: str,
    context_size: int,
    d_in: int = 1,
    autocast_lm: bool = False,
    excluded: torch.Tensor | None = None,
) -> ActivationsStore:
    """
    SAELens's store at the start of a text, for its ``iterable_sequences`` and
    ``get_activations``; only the latter needs ``d_in``. With ``autocast_lm`` activations are
    computed in bfloat16, but for the residual stream. It knows the ``excluded`` tokens.
    """
    return ActivationsStore(
        model=model,
        dataset=text,
        streaming=False,
        hook_name=hook_name,
        hook_head_index=None,
        context_size=context_size,
        d_in=d_in,
        # These concern neither of the two methods.
        **buffer_argument(1, ActivationsStore),
        total_training_tokens=1,
        store_batch_size_prompts=1,
        train_batch_size_tokens=context_size,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        autocast_lm=autocast_lm,
        exclude_special_tokens=excluded,
    )

"""
Writing of cached activations.

The model reads a text as in training (SAELens's store makes the contexts), and its activations
are written in the order of the text, in shards: nothing is shuffled before it is read.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from sae_lens.config import HfDataset, LanguageModelSAERunnerConfig
from sae_lens.saes.standard_sae import StandardTrainingSAEConfig
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookedRootModule

from sae_lens_scale.files import replacing_files, require_writable
from sae_lens_scale.runner import InterruptibleTrainingRunner
from sae_lens_scale.upstream import input_device

from .manifest import (
    read_manifest,
    require_source,
    source_of,
    versions,
    write_manifest,
)
from .reading import map_shard, map_shards, read_ahead

_SHARD_POSITIONS = 2**15
_LOCK = ".lock"
# Of a value in bfloat16, and of a token id.
_VALUE_BYTES, _ID_BYTES = 2, 4


def cache_activations(
    cfg: LanguageModelSAERunnerConfig[Any],
    override_dataset: HfDataset | None = None,
    override_model: HookedRootModule | None = None,
) -> int:
    """
    Run the language model on a text, and keep its activations in bfloat16.

    Runs that have the same model, hook, text and contexts, and ``use_cached_activations``,
    then train on them instead of running the model, with
    :class:`.InterruptibleTrainingRunner`. An interrupted cache goes on with the next shard, a
    finished one can be made longer.

    Args:
        cfg: Config of such a run: ``training_tokens`` are cached in
            ``cached_activations_path``, rounded up to a context, or the whole text if it
            holds fewer.
        override_dataset: The text, instead of the config's.
        override_model: The language model, instead of the config's.

    Returns:
        Number of tokens in the cache, those left out (``exclude_special_tokens``) not counted.

    Raises:
        ValueError: As the runner; if the folder holds something else, a damaged shard, or
            activations of other settings or of another text; if another process writes there.
        OSError: If the folder cannot be written into, or there is no room for the cache.
    """
    if cfg.cached_activations_path is None:
        raise ValueError("cached_activations_path must name a folder, got None")
    folder = Path(cfg.cached_activations_path)
    require_writable("cached_activations_path", folder)
    manifest = _manifest(cfg, folder)
    if _holds(folder, manifest["tokens"], cfg.training_tokens):
        return manifest["tokens"]
    _require_room(cfg, folder)
    live = copy(cfg)
    live.use_cached_activations = False
    live.resume_from_checkpoint = live.from_pretrained_path = None
    # None is trained here, and the one to come may fill the memory.
    live.sae = StandardTrainingSAEConfig(d_in=cfg.sae.d_in, d_sae=1)
    store = InterruptibleTrainingRunner(
        live, override_dataset, override_model
    ).activations_store
    with _writing_alone(folder):
        # Another process may have written while the model was loaded.
        manifest = _manifest(cfg, folder)
        write_manifest(folder, manifest)
        tokens = write_shards(
            store,
            folder,
            max(cfg.training_tokens, manifest["tokens"]),
            cfg.store_batch_size_prompts,
        )
        if not tokens:
            raise ValueError(
                f"dataset_path {cfg.dataset_path} must hold tokens, got none"
            )
        write_manifest(folder, {**manifest, "tokens": tokens})
    return tokens


def _manifest(cfg: LanguageModelSAERunnerConfig[Any], folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder to cache into, or make one where there is none."""
    manifest = read_manifest(folder)
    if manifest is None:
        if folder.exists() and any(f.name != _LOCK for f in folder.iterdir()):
            raise ValueError(
                f"cached_activations_path {folder} must be empty, or hold a cache to go on "
                "with, got other files"
            )
        manifest = {**source_of(cfg), "tokens": 0, "versions": versions()}
    require_source(cfg, folder, manifest)
    return manifest


def _holds(folder: Path, tokens: int, wanted: int) -> bool:
    """Say whether a cache has the tokens that are wanted, and no shard is missing."""
    if tokens < wanted:
        return False
    return sum(len(shard["token_ids"]) for shard in map_shards(folder)) >= tokens


@contextmanager
def _writing_alone(folder: Path) -> Iterator[None]:
    """Keep other processes from caching into a folder, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        # Released by the system, however the process ends.
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"cached_activations_path {folder} is being written by another process"
        ) from error
    try:
        yield
    finally:
        lock.release()


def cache_bytes(cfg: LanguageModelSAERunnerConfig[Any]) -> int:
    """Compute the size of a cache of ``training_tokens``, in bytes, within 1 %."""
    return int(cfg.training_tokens) * (_VALUE_BYTES * cfg.sae.d_in + _ID_BYTES)


def _require_room(cfg: LanguageModelSAERunnerConfig[Any], folder: Path) -> None:
    path = folder.absolute()
    existing = next(p for p in (path, *path.parents) if p.exists())
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    missing = cache_bytes(cfg) - written
    free = shutil.disk_usage(existing).free
    if missing > free:
        raise OSError(
            f"cached_activations_path {folder} must have room for {missing / 1e9:,.3f} GB, "
            f"got {free / 1e9:,.3f} GB"
        )


def write_shards(
    store: ActivationsStore, folder: Path, tokens: int, prompts_per_batch: int
) -> int:
    """
    Write the activations of a text's first tokens, and these tokens.

    Shards that exist are not computed again, but for a last one that is too short.

    Args:
        store: The store, at the start of the text; what it excludes is left out.
        folder: Folder of the shards.
        tokens: Number of tokens to write, rounded up to a context.
        prompts_per_batch: Contexts that the model reads at once.

    Returns:
        Number of tokens in the folder, fewer if the text ends before.

    Raises:
        ValueError: If a shard is of another text.
    """
    excluded = store.exclude_special_tokens
    excluded = torch.tensor([]) if excluded is None else excluded.cpu()
    per_shard = max(1, _SHARD_POSITIONS // store.context_size)
    # Until the text ends.
    shards = iter(lambda: list(islice(store.iterable_sequences, per_shard)), [])
    rows = 0
    with tqdm(
        total=tokens, desc=f"Activations in {folder.name}", unit=" tokens"
    ) as bar:
        for i, contexts in enumerate(read_ahead(shards)):
            whole = torch.stack(contexts)
            ids = whole[:, slice(*store.seqpos_slice)].cpu()
            keep = ~torch.isin(ids, excluded)
            file = folder / f"{i:05}.safetensors"
            before = (
                map_shard(file)["token_ids"].long() if file.exists() else ids[0, :0]
            )
            # These tokens are all that is kept of the text; they must be the same.
            if not torch.equal(before, ids[keep][: len(before)]):
                raise ValueError(f"{file} was made from another text")
            # Contexts that have the tokens that are still missing.
            enough = keep.sum(1).cumsum(0) >= tokens - rows
            keep = keep[: int((~enough).sum()) + 1]
            token_ids = ids[: len(keep)][keep]
            if len(before) < len(token_ids):
                activations = []
                for kept, prompts in zip(
                    keep.split(prompts_per_batch),
                    whole[: len(keep)].split(prompts_per_batch),
                    strict=True,
                ):
                    on_model = prompts.to(input_device(store.model))
                    computed = store.get_activations(on_model).bfloat16().cpu()
                    activations.append(computed[kept])
                    bar.update(len(activations[-1]))
                shard = {
                    "activations": torch.cat(activations),
                    "token_ids": token_ids.int(),
                }
                with replacing_files(folder) as temporary:
                    save_file(shard, temporary / file.name)
            else:
                bar.update(len(before))
            rows += max(len(before), len(token_ids))
            if rows >= tokens:
                break
    return rows

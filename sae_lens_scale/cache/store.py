"""SAELens's store of activations, over a cache."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens.config import HfDataset, LanguageModelSAERunnerConfig
from sae_lens.constants import (
    ACTIVATIONS_STORE_STATE_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.mixing_buffer import mixing_buffer
from safetensors.torch import load_file
from transformer_lens.hook_points import HookedRootModule
from typing_extensions import override

from sae_lens_scale.run_settings import ESTIMATED_NORMALIZATIONS
from sae_lens_scale.upstream import buffer_argument

from .manifest import read_manifest
from .reading import Activations, map_shards, read_ahead

# In a checkpoint of the store.
_TOKENS = "cached_tokens"


class CachedActivationsStore(ActivationsStore):
    """
    SAELens's store of a text, for evaluations, with batches to train on from a cache.

    Attributes:
        tokens: Number of the cache's tokens that are read, which checkpoints keep.
        batches: The batches, such as :func:`cached_batches`.
    """

    tokens: int
    batches: Iterator[torch.Tensor]

    @override
    def __next__(self) -> torch.Tensor:
        return next(self.batches)

    @override
    def state_dict(self) -> dict[str, torch.Tensor]:
        return super().state_dict() | {_TOKENS: torch.tensor(self.tokens)}


class NoModel(HookedRootModule):
    """Stand-in for a language model where none is run."""


def no_text(context_size: int) -> HfDataset:
    """
    Make a stand-in for a text where none is read.

    Args:
        context_size: Tokens of its one row, at which SAELens's store looks.
    """
    row = {"tokens": [[0] * context_size]}
    return Dataset.from_dict(row).to_iterable_dataset()


def cached_tokens(cfg: LanguageModelSAERunnerConfig[Any]) -> int:
    """
    Number of a cache's tokens that a run reads.

    Args:
        cfg: Config of the run.

    Returns:
        All of them, or as many as the run has read before that it goes on with: a cache may
        have grown, and the order is one of so many tokens.
    """
    if cfg.resume_from_checkpoint is not None:
        path = Path(cfg.resume_from_checkpoint, ACTIVATIONS_STORE_STATE_FILENAME)
        # There are none in the checkpoint of a run that read no cache.
        if (tokens := load_file(path).get(_TOKENS)) is not None:
            return int(tokens)
    manifest = read_manifest(Path(str(cfg.cached_activations_path)))
    assert manifest is not None
    return manifest["tokens"]


def cached_batches(
    cfg: LanguageModelSAERunnerConfig[Any],
    sae_cfg: TrainingSAEConfig,
    share: slice,
    tokens: int,
) -> Iterator[torch.Tensor]:
    """
    Read the batches of a run from its cache, from the step on that it begins or goes on with.

    Args:
        cfg: Config of the run; its buffer is the window within which tokens are mixed.
        sae_cfg: Config of the SAE, which need not be the run's.
        share: Rows of each batch to read.
        tokens: Number of the cache's tokens to read, its first ones.

    Returns:
        Batches ``[rows, d_in]`` in float32 on ``act_store_device``, without an end. Which ones
        depends on the config, on ``tokens`` and on the step only: a run that goes on from a
        checkpoint reads those that it would have read.

    Raises:
        ValueError: If a shard is missing, or damaged.
    """
    folder = Path(str(cfg.cached_activations_path))
    shards = [shard["activations"] for shard in map_shards(folder)]
    found = sum(map(len, shards))
    if found < tokens:
        raise ValueError(
            f"cached_activations_path {folder} must hold {tokens} tokens, got {found}: a "
            "shard is missing; cache again, to make it anew"
        )
    (buffer,) = buffer_argument(1)
    windows = Activations(shards, tokens).windows(
        int(getattr(cfg, buffer) * cfg.context_size),
        cfg.seed,
        _tokens_read(cfg, sae_cfg),
        str(cfg.act_store_device),
    )
    size = cfg.train_batch_size_tokens
    batches = mixing_buffer(size, size, read_ahead(windows), mix_fraction=0)
    return (batch[share].float() for batch in batches)


def _tokens_read(
    cfg: LanguageModelSAERunnerConfig[Any], sae_cfg: TrainingSAEConfig
) -> int:
    """Tokens that a run has read before it goes on from its checkpoint, if it does."""
    if cfg.resume_from_checkpoint is None:
        return 0
    state = torch.load(
        Path(cfg.resume_from_checkpoint, TRAINER_STATE_FILENAME),
        map_location="meta",
        mmap=True,
    )
    read = state["n_training_samples"]
    if sae_cfg.normalize_activations in ESTIMATED_NORMALIZATIONS:
        read += cfg.n_batches_for_norm_estimate * cfg.train_batch_size_tokens
    return read

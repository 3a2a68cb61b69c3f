"""SAELens's store of activations, over a cache."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens.config import HfDataset, LanguageModelSAERunnerConfig
from sae_lens.constants import TRAINER_STATE_FILENAME
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.mixing_buffer import mixing_buffer
from transformer_lens.hook_points import HookedRootModule
from typing_extensions import override

from sae_lens_scale.run_settings import ESTIMATED_NORMALIZATIONS
from sae_lens_scale.upstream import buffer_argument

from .manifest import read_manifest
from .reading import Activations, map_shards, read_ahead


class CachedActivationsStore(ActivationsStore):
    """
    SAELens's store of a text, for evaluations, with batches to train on from a cache.

    Attributes:
        batches: The batches, such as :func:`cached_batches`.
    """

    batches: Iterator[torch.Tensor]

    @override
    def __next__(self) -> torch.Tensor:
        return next(self.batches)


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


def cached_batches(
    cfg: LanguageModelSAERunnerConfig[Any], sae_cfg: TrainingSAEConfig, share: slice
) -> Iterator[torch.Tensor]:
    """
    Read the batches of a run from its cache, from the step on that it begins or goes on with.

    Args:
        cfg: Config of the run; its buffer is the window within which tokens are mixed.
        sae_cfg: Config of the SAE, which need not be the run's.
        share: Rows of each batch to read.

    Returns:
        Batches ``[rows, d_in]`` in float32 on ``act_store_device``, without an end. Which ones
        depends on the config and on the step only: a run that goes on from a checkpoint reads
        those that it would have read.

    Raises:
        ValueError: If a shard is missing, or damaged.
    """
    folder = Path(str(cfg.cached_activations_path))
    manifest = read_manifest(folder)
    assert manifest is not None
    shards = [shard["activations"] for shard in map_shards(folder)]
    found, tokens = sum(map(len, shards)), manifest["tokens"]
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

"""Caches of a tiny model's activations, and configs of runs on them."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

from datasets import Dataset
from helpers import small_corpus
from integration.runs import SHORT, runner_config, sae_config
from sae_lens import LanguageModelSAERunnerConfig

from sae_lens_scale.cache import writing

TOKENS = 3_000


def text() -> Dataset:
    return small_corpus()


def cached_config(
    folder: Path,
    *,
    sae: dict[str, Any] | None = None,
    architecture: str = "scale",
    **overrides: Any,
) -> LanguageModelSAERunnerConfig[Any]:
    """Config of a run that reads its cache: 60 steps of 256 tokens, which is 4 to 5 epochs."""
    settings = {
        **SHORT,
        "dataset_path": "some text",
        "exclude_special_tokens": True,
        # A window of 512 tokens.
        "n_batches_in_buffer": 16,
        "use_cached_activations": True,
        "cached_activations_path": str(folder),
    }
    return runner_config(
        sae_config(architecture, **(sae or {})), **{**settings, **overrides}
    )


def cache(folder: Path, model: Any, tokens: int = TOKENS, **overrides: Any) -> int:
    """Write a cache for such a run, in shards of 16 contexts; the tokens in it."""
    cfg = cached_config(folder, training_tokens=tokens, **overrides)
    with patch.object(writing, "_SHARD_POSITIONS", 512):
        return writing.cache_activations(cfg, text(), model)

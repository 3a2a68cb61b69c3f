"""Caches of activations: of a tiny model, and of no model at all."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from helpers import small_corpus
from safetensors.torch import save_file

from reproduction.activations import CacheSettings

SETTINGS = CacheSettings(
    model="tiny",
    hook_name="blocks.0.hook_resid_post",
    text="some text",
    other_text="another text",
    train_tokens=1_000,
    test_tokens=300,
    other_tokens=200,
    context_size=32,
)
TEXTS: dict[Any, Dataset] = {
    "train": small_corpus().select(range(20, 60)),
    "in_domain": small_corpus().select(range(20)),
    "other_domain": small_corpus().select(range(60, 80)),
}


def write_random_cache(folder: Path, settings: CacheSettings) -> None:
    """Write a cache as of these settings, of random activations of width 12."""
    generator = torch.Generator().manual_seed(0)
    for name, split in settings.splits().items():
        (folder / name).mkdir(parents=True)
        x = torch.randn(split.tokens, 12, generator=generator).bfloat16()
        ids = torch.zeros(split.tokens, dtype=torch.int32)
        file = folder / name / "00000.safetensors"
        save_file({"activations": x, "token_ids": ids}, file)
        manifest = json.dumps({**vars(split), "d_in": 12})
        (folder / name / "manifest.json").write_text(manifest)

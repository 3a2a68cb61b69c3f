"""What to cache of a tiny model, and texts to cache it on."""

from typing import Any

from datasets import Dataset
from helpers import small_corpus

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

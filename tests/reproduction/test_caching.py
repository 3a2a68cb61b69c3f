"""Caching: what is kept, and how it survives interruptions."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import HookedSAETransformer
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import get_special_token_ids
from safetensors.torch import load_file, save_file
from tiny_cache import SETTINGS, TEXTS

from reproduction import caching as module
from reproduction.activations import ActivationCache, Activations, CacheSettings
from reproduction.caching import cache_activations
from sae_lens_scale.cache import writing
from sae_lens_scale.loading.language_model import fast_bfloat16

Make = Callable[..., ActivationCache]


@pytest.fixture
def make(
    tiny_model: HookedSAETransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Make:
    """Caches a tiny model's activations in shards of 8 contexts."""
    monkeypatch.setattr(writing, "_SHARD_POSITIONS", 256)

    def cache(
        settings: CacheSettings = SETTINGS, folder: Path = tmp_path, **changes: Any
    ) -> ActivationCache:
        options = {"model": tiny_model, "texts": TEXTS, "prompts_per_batch": 3}
        return cache_activations(settings, folder, **{**options, **changes})

    return cache


def rows(activations: Activations) -> torch.Tensor:
    return torch.cat(list(activations.batches(64)))


def test_the_cache_holds_what_SAELenss_store_would_train_on(
    make: Make, tiny_model: HookedSAETransformer
):
    cache = make()
    tokenizer: Any = tiny_model.tokenizer
    store = ActivationsStore(
        model=tiny_model,
        dataset=TEXTS["train"],
        streaming=False,
        hook_name=SETTINGS.hook_name,
        hook_head_index=None,
        context_size=32,
        d_in=32,
        n_batches_in_buffer=8,
        total_training_tokens=1,
        store_batch_size_prompts=3,
        train_batch_size_tokens=64,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        autocast_lm=fast_bfloat16("cpu"),
        exclude_special_tokens=torch.tensor(get_special_token_ids(tokenizer)),
    )
    want = torch.cat([store.get_filtered_llm_batch() for _ in range(12)])
    assert (len(cache.train), cache.train.d_in) == (1_000, 32)
    assert torch.equal(rows(cache.train), want[:1_000].bfloat16().float())
    assert cache.other_domain is not None
    assert (len(cache.in_domain), len(cache.other_domain)) == (300, 200)
    assert not torch.equal(rows(cache.in_domain)[:200], rows(cache.other_domain))


def test_an_interrupted_cache_goes_on_with_the_next_shard(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    want = rows(make(folder=tmp_path / "whole").train)
    compute = ActivationsStore.get_activations
    calls = []

    def interrupted(self: ActivationsStore, tokens: torch.Tensor) -> torch.Tensor:
        calls.append(len(tokens))
        if sum(calls) > 20:
            raise KeyboardInterrupt
        return compute(self, tokens)

    monkeypatch.setattr(ActivationsStore, "get_activations", interrupted)
    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        make(folder=folder)
    names = {path.name for path in (folder / "train").iterdir()}
    assert names == {"manifest.json", "00000.safetensors", "00001.safetensors"}
    with pytest.raises(ValueError, match="caching was not finished"):
        ActivationCache.open(folder, replace(SETTINGS, other_text=None))

    calls.clear()
    counted: Any = lambda self, tokens: (
        calls.append(len(tokens)) or compute(self, tokens)
    )
    monkeypatch.setattr(ActivationsStore, "get_activations", counted)
    cache = make(folder=folder)
    # Contexts of the training text, of the held-out and of the other.
    assert sum(calls) == 17 + 10 + 7
    assert torch.equal(rows(cache.train), want)
    calls.clear()
    assert torch.equal(rows(make(folder=folder, model=None, texts=None).train), want)
    assert not calls


def test_a_cache_can_grow_and_a_larger_one_serves_a_smaller(make: Make):
    small = rows(make().train)
    large = rows(make(replace(SETTINGS, train_tokens=1_500)).train)
    assert len(large) == 1_500
    assert torch.equal(large[:1_000], small)
    assert torch.equal(rows(make(model=None).train), small)


@pytest.mark.parametrize("begun", [True, False])
def test_a_cache_grows_in_the_precision_that_it_began_in(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
):
    longer = replace(SETTINGS, train_tokens=1_500)
    monkeypatch.setattr(module, "fast_bfloat16", lambda _: begun)
    want = rows(make(longer, tmp_path / "whole").train)
    make(folder=tmp_path / "grown")
    monkeypatch.setattr(module, "fast_bfloat16", lambda _: not begun)
    assert torch.equal(rows(make(longer, tmp_path / "grown").train), want)
    other = rows(make(longer, tmp_path / "other").train)
    assert not torch.equal(other, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hook_name": "blocks.1.hook_resid_post"}, "hook_name='blocks.0.hook_re"),
        ({"model": "other"}, "model='tiny', not 'other'"),
        ({"text": "other"}, "text='some text', not 'other'"),
        ({"context_size": 64}, "context_size=32, not 64"),
    ],
)
def test_a_cache_of_other_settings_is_refused(
    make: Make, tmp_path: Path, change: Any, message: str
):
    make()
    other = replace(SETTINGS, **change)
    with pytest.raises(ValueError, match=message):
        ActivationCache.open(tmp_path, other)
    with pytest.raises(ValueError, match=message):
        make(other)


def test_what_cannot_be_cached_is_refused(make: Make, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds no activations"):
        ActivationCache.open(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="ends after [0-9,]+ tokens, but 9,999,999"):
        make(replace(SETTINGS, test_tokens=9_999_999))
    # Shards of the training text are there, but of documents that have changed since.
    changed = {**TEXTS, "train": TEXTS["other_domain"]}
    with pytest.raises(ValueError, match="00000.safetensors was made from another"):
        make(replace(SETTINGS, train_tokens=2_000), texts=changed)
    with pytest.raises(ValueError, match="hook_name must be a hook of the model"):
        make(replace(SETTINGS, hook_name="nowhere"), tmp_path / "new")
    with pytest.raises(ValueError, match="train_tokens must be positive, got 0"):
        replace(SETTINGS, train_tokens=0)


def test_a_cache_is_known_by_hashes_of_all_its_tokens(make: Make, tmp_path: Path):
    def train_hash(settings: CacheSettings) -> str:
        description = ActivationCache.open(tmp_path, settings).describe()
        assert description is not None
        assert set(description["texts"]) == {"train", "in_domain", "other_domain"}
        return description["texts"]["train"]

    longer = replace(SETTINGS, train_tokens=1_001)
    make()
    before = train_hash(SETTINGS)
    assert train_hash(longer) != before
    *others, last = sorted((tmp_path / "train").glob("*.safetensors"))
    first = sum(len(load_file(file)["token_ids"]) for file in others)
    # Copies: what is mapped from a file cannot be written over it.
    shard = {name: tensor.clone() for name, tensor in load_file(last).items()}
    # Token 1,001 is of no concern to who reads 1,000.
    for token, same in ((1_000, True), (999, False)):
        shard["token_ids"][token - first] += 1
        save_file(shard, last)
        assert (train_hash(SETTINGS) == before) is same

"""Caching: what is kept, what it costs, and how it survives interruptions."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cache.runs import TOKENS, cache, cached_config, text
from datasets import Dataset
from filelock import FileLock
from sae_lens import HookedSAETransformer
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_scale.cache import writing
from sae_lens_scale.cache.manifest import MANIFEST
from sae_lens_scale.cache.reading import map_shards
from sae_lens_scale.cache.writing import cache_activations, cache_bytes


def activations_in(folder: Path) -> torch.Tensor:
    return torch.cat([shard["activations"] for shard in map_shards(folder)])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"seqpos_slice": (3, -2), "exclude_special_tokens": False},
        {"hook_name": "blocks.1.attn.hook_z", "exclude_special_tokens": [198]},
        {"hook_name": "blocks.1.attn.hook_q", "hook_head_index": 2, "sae": {"d_in": 8}},
    ],
    ids=str,
)
def test_a_cache_holds_what_SAELenss_store_would_train_on(
    settings: dict[str, Any], tiny_model: HookedSAETransformer, tmp_path: Path
):
    tokens = cache(tmp_path, tiny_model, 600, **settings)
    cfg = cached_config(tmp_path, **settings, use_cached_activations=False)
    store = ActivationsStore.from_config(tiny_model, cfg, override_dataset=text())
    want = torch.cat([store.get_filtered_llm_batch() for _ in range(4)])
    got = activations_in(tmp_path)
    assert 600 <= len(got) == tokens
    assert torch.equal(got, want[:tokens].bfloat16())
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    exact = cached_config(tmp_path, **settings, training_tokens=tokens)
    assert cache_bytes(exact) == pytest.approx(size, rel=0.03)


def test_a_cache_takes_no_memory_for_the_SAE_to_come(
    tiny_model: HookedSAETransformer, tmp_path: Path
):
    too_large_for_any_machine = {"d_sae": 2**50}
    assert cache(tmp_path, tiny_model, 300, sae=too_large_for_any_machine) >= 300


def test_an_interrupted_cache_goes_on_with_the_next_shard_and_may_grow(
    tiny_model: HookedSAETransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, folder = tmp_path / "whole", tmp_path / "cut"
    cache(whole, tiny_model)
    compute = ActivationsStore.get_activations
    calls: list[int] = []

    def interrupted(self: ActivationsStore, tokens: torch.Tensor) -> torch.Tensor:
        calls.append(len(tokens))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(self, tokens)

    monkeypatch.setattr(ActivationsStore, "get_activations", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache(folder, tiny_model)
    assert len(list(folder.glob("*.safetensors"))) == 2
    with pytest.raises(ValueError, match=r"cut is not finished: cache again"):
        cache_run = cached_config(folder)
        writing.InterruptibleTrainingRunner(cache_run)
    tokens = cache(folder, tiny_model)
    assert len(calls) == len(list(folder.glob("*.safetensors"))) + 1
    assert torch.equal(activations_in(folder), activations_in(whole))
    # It is finished: nothing is loaded.
    assert cache(folder, None) == tokens
    calls[:] = [0] * 3
    assert cache(folder, tiny_model, tokens + 1) > tokens
    assert len(calls) == 4
    assert torch.equal(activations_in(folder)[:tokens], activations_in(whole))


def test_a_missing_shard_is_made_anew(tiny_model: HookedSAETransformer, tmp_path: Path):
    tokens = cache(tmp_path, tiny_model)
    before = activations_in(tmp_path)
    shard = tmp_path / "00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{re.escape(str(shard))} is damaged"):
        cache(tmp_path, tiny_model)
    shard.unlink()
    # Fewer tokens are asked for than it has: all of them come back.
    assert cache(tmp_path, tiny_model, 600) == tokens
    assert torch.equal(activations_in(tmp_path), before)


def test_two_processes_do_not_mix_their_activations(
    tiny_model: HookedSAETransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make = writing.InterruptibleTrainingRunner
    other = cached_config(tmp_path, hook_name="blocks.1.hook_resid_post")

    def while_another_begins(*arguments: Any) -> Any:
        runner = make(*arguments)
        monkeypatch.setattr(writing, "InterruptibleTrainingRunner", make)
        cache(tmp_path, tiny_model, 600)
        return runner

    monkeypatch.setattr(writing, "InterruptibleTrainingRunner", while_another_begins)
    with pytest.raises(
        ValueError, match="hook_name must be 'blocks.0.hook_resid_post'"
    ):
        cache_activations(other, text(), tiny_model)
    refused = pytest.raises(ValueError, match="is being written by another process")
    # One of this process, of another descriptor, is as that of another process.
    with FileLock(tmp_path / ".lock"), refused:
        cache(tmp_path, tiny_model)
    assert cache(tmp_path, tiny_model) >= TOKENS


def test_a_short_text_is_kept_whole(tiny_model: HookedSAETransformer, tmp_path: Path):
    cfg = cached_config(tmp_path, training_tokens=10**6)
    tokens = cache_activations(cfg, text().select(range(5)), tiny_model)
    assert 100 < tokens < 10_000
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["tokens"] == tokens == len(activations_in(tmp_path))


def test_what_cannot_be_cached_is_refused(
    tiny_model: HookedSAETransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refused(error: str, kind: Any = ValueError, **settings: Any) -> None:
        with pytest.raises(kind, match=error):
            cache(tmp_path, tiny_model, **settings)

    cfg = cached_config(tmp_path, use_cached_activations=False)
    cfg.cached_activations_path = None
    with pytest.raises(ValueError, match="path must name a folder, got None"):
        cache_activations(cfg, text(), tiny_model)
    refused("has no hook 'blocks.7.hook_x'", hook_name="blocks.7.hook_x")
    assert not any(tmp_path.iterdir())
    no_room = lambda path: SimpleNamespace(free=1_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", no_room)
        refused("must have room for 0.000 GB, got 0.000 GB", OSError)
    (tmp_path / "other").touch()
    refused("must be empty, or hold a cache to go on with, got other files")
    os.remove(tmp_path / "other")
    cache(tmp_path, tiny_model, 600)
    refused("context_size must be 32, as of the activations in", context_size=64)
    other: Any = Dataset.from_dict({"text": text()["text"][::-1]})
    longer = cached_config(tmp_path, training_tokens=TOKENS)
    file = re.escape(str(tmp_path / "00000.safetensors"))
    with pytest.raises(ValueError, match=f"{file} was made from another text"):
        cache_activations(longer, other, tiny_model)

"""Grids of runs, in one process and in several."""

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_cache import write_random_cache

from reproduction.activations import ActivationCache, Activations, CacheSettings
from reproduction.grid import run_grid
from reproduction.settings import RunSettings

CACHE = CacheSettings(train_tokens=1_500, test_tokens=200)
SMALL: dict[str, Any] = {
    "batch_size": 64,
    "training_tokens": 640,
    "tokens_per_expert": 20,
}
SCALE = RunSettings("scale", {"d_sae": 64, "num_experts": 8, "k": 4}, **SMALL)
TOPK = RunSettings("topk", {"d_sae": 16, "k": 4}, **SMALL)
OTHER_TOPK = RunSettings("topk", {"d_sae": 16, "k": 2}, **SMALL)
GRID = [SCALE, TOPK, OTHER_TOPK]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache on disk of random activations."""
    folder = tmp_path_factory.mktemp("cache")
    write_random_cache(folder, CACHE)
    return folder


@pytest.fixture
def cache(folder: Path) -> ActivationCache:
    return ActivationCache.open(folder, CACHE)


def in_memory(*slices: slice) -> list[ActivationCache]:
    """Caches of the same random activations, with these to evaluate on."""
    x = torch.randn(700, 12, generator=torch.Generator().manual_seed(0))
    return [ActivationCache(Activations([x]), Activations([x[s]])) for s in slices]


def test_several_processes_train_what_one_does(cache: ActivationCache, tmp_path: Path):
    threads = torch.get_num_threads()
    environment = dict(os.environ)
    together = run_grid(GRID, cache, tmp_path / "2", workers=2, keep_weights=True)
    alone = run_grid(GRID, cache, tmp_path / "1", threads=1)
    assert torch.get_num_threads() == threads
    assert dict(os.environ) == environment
    for one, other, run in zip(together, alone, GRID, strict=True):
        assert one.name == other.name == run.name
        assert one.in_domain == pytest.approx(other.in_domain, rel=1e-4)
        assert (one.environment["workers"], other.environment["workers"]) == (2, 1)
        assert one.environment["threads"] == max(1, (os.cpu_count() or 1) // 2)
        assert other.environment["threads"] == 1
        assert (tmp_path / "2" / run.name / "cfg.json").exists()
        assert not (tmp_path / "1" / run.name).exists()
    # Twice the same run is one; those that are there are read.
    assert run_grid([*GRID, *GRID], cache, tmp_path / "2") == together


def test_wanted_weights_that_are_not_there_are_named(
    cache: ActivationCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run_grid([SCALE], cache, tmp_path)
    run_grid(GRID, cache, tmp_path, keep_weights=True)
    err = capsys.readouterr().err
    assert "1 runs were trained without keeping their weights" in err
    assert f"move their records away: {SCALE.name}" in err
    assert [(tmp_path / run.name).is_dir() for run in GRID] == [False, True, True]
    run_grid(GRID[1:], cache, tmp_path, keep_weights=True)
    assert "weights" not in capsys.readouterr().err


def test_an_interruption_stops_the_workers(cache: ActivationCache, tmp_path: Path):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    long = {**SMALL, "training_tokens": 10**9}
    runs = [RunSettings("topk", {"d_sae": 16, "k": k}, **long) for k in (2, 4, 8)]
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_grid(runs, cache, tmp_path / "runs", workers=2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not multiprocessing.active_children()
    assert not (tmp_path / "runs").exists()


def test_a_run_that_fails_does_not_keep_the_others_from_running(
    cache: ActivationCache, tmp_path: Path
):
    # A step of this size leaves no finite weight.
    bad = RunSettings("scale", SCALE.sae, lr=1e38, **SMALL)
    message = f"1 runs failed: {bad.name} .ValueError: the"
    with pytest.raises(RuntimeError, match=message):
        run_grid([bad, TOPK], cache, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{TOPK.name}.json"]


def test_activations_in_memory_are_for_one_process(tmp_path: Path):
    (cache,) = in_memory(slice(50))
    with pytest.raises(ValueError, match="workers must be 1 for activations"):
        run_grid(GRID, cache, tmp_path, workers=2)
    assert len(run_grid(GRID[1:], cache, tmp_path)) == 2


def test_records_of_another_cache_are_refused_before_training(
    folder: Path, cache: ActivationCache, tmp_path: Path
):
    output = tmp_path / "runs"
    run_grid([TOPK], cache, output)
    smaller = CacheSettings(train_tokens=1_400, test_tokens=200)
    with pytest.raises(ValueError, match="made with train_tokens=1500, now it would"):
        run_grid(GRID, ActivationCache.open(folder, smaller), output)
    # The same settings, but other tokens.
    other = shutil.copytree(folder, tmp_path / "cache")
    file = other / "train" / "00000.safetensors"
    shard = load_file(file)
    save_file({**shard, "token_ids": shard["token_ids"] + 1}, file)
    changed = ActivationCache.open(other, CACHE)
    with pytest.raises(ValueError, match=r"was made with texts=\{'train': '"):
        run_grid([TOPK], changed, output)
    with pytest.raises(ValueError, match=r"k4-s0-.*json is of other tokens \(\{'train"):
        run_grid([OTHER_TOPK], changed, output)
    assert len(list(output.iterdir())) == 1


def test_records_of_another_text_in_memory_are_refused_before_training(tmp_path: Path):
    first, other = in_memory(slice(300), slice(300, 600))
    run_grid([TOPK], first, tmp_path)
    with pytest.raises(ValueError, match="must be measured on one text, but the var"):
        run_grid(GRID[1:], other, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    x = first.in_domain.take(torch.arange(300)).bfloat16()
    rounded = ActivationCache(first.train, Activations([x]))
    assert len(run_grid(GRID[1:], rounded, tmp_path)) == 2

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

from reproduction.activations import (
    ActivationCache,
    Activations,
    CacheSettings,
)
from reproduction.grid import run_grid
from reproduction.settings import RunSettings

CACHE = CacheSettings(train_tokens=1_500, test_tokens=200)
SMALL: dict[str, Any] = {
    "batch_size": 64,
    "training_tokens": 640,
    "tokens_per_expert": 20,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache on disk of random activations."""
    folder = tmp_path_factory.mktemp("cache")
    write_random_cache(folder, CACHE)
    return folder


def grid(**changes: Any) -> list[RunSettings]:
    scale = {"d_sae": 64, "num_experts": 8, "k": 4}
    common = {**SMALL, **changes}
    return [
        RunSettings("scale", scale, **common),
        RunSettings("topk", {"d_sae": 16, "k": 4}, **common),
        RunSettings("topk", {"d_sae": 16, "k": 2}, **common),
    ]


def test_several_processes_train_what_one_does(folder: Path, tmp_path: Path):
    cache = ActivationCache.open(folder, CACHE)
    threads = torch.get_num_threads()
    environment = dict(os.environ)
    together = run_grid(grid(), cache, tmp_path / "2", workers=2, keep_weights=True)
    alone = run_grid(grid(), cache, tmp_path / "1", threads=1)
    assert torch.get_num_threads() == threads
    assert dict(os.environ) == environment
    for one, other, run in zip(together, alone, grid(), strict=True):
        assert one.name == other.name == run.name
        assert one.in_domain == pytest.approx(other.in_domain, rel=1e-4)
        assert (one.environment["workers"], other.environment["workers"]) == (2, 1)
        assert one.environment["threads"] == max(1, (os.cpu_count() or 1) // 2)
        assert other.environment["threads"] == 1
        assert (tmp_path / "2" / run.name / "cfg.json").exists()
        assert not (tmp_path / "1" / run.name).exists()
    # Twice the same run is one; those that are there are read.
    again = run_grid([*grid(), *grid()], cache, tmp_path / "2")
    assert again == together


def test_whoever_wants_weights_hears_that_there_are_none(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cache = ActivationCache.open(folder, CACHE)
    first, *_ = runs = grid()
    run_grid([first], cache, tmp_path)
    run_grid(runs, cache, tmp_path, keep_weights=True)
    err = capsys.readouterr().err
    assert "1 runs were trained without keeping their weights" in err
    assert f"move their records away: {first.name}" in err
    assert [(tmp_path / run.name).is_dir() for run in runs] == [False, True, True]
    run_grid(runs[1:], cache, tmp_path, keep_weights=True)
    assert "weights" not in capsys.readouterr().err


def test_an_interruption_stops_the_workers(folder: Path, tmp_path: Path):
    cache = ActivationCache.open(folder, CACHE)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_grid(grid(training_tokens=10**9), cache, tmp_path / "runs", workers=2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not multiprocessing.active_children()
    assert not (tmp_path / "runs").exists()


def test_a_run_that_fails_does_not_keep_the_others_from_running(
    folder: Path, tmp_path: Path
):
    cache = ActivationCache.open(folder, CACHE)
    runs = grid()
    # A step of this size leaves no finite weight.
    bad = RunSettings("scale", runs[0].sae, lr=1e38, **SMALL)
    with pytest.raises(
        RuntimeError, match=f"1 runs failed: {bad.name} .ValueError: the"
    ):
        run_grid([bad, runs[1]], cache, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{runs[1].name}.json"]


def test_activations_in_memory_are_for_one_process(tmp_path: Path):
    x = torch.randn(700, 12, generator=torch.Generator().manual_seed(0))
    cache = ActivationCache(Activations([x]), Activations([x[:50]]))
    with pytest.raises(ValueError, match="workers must be 1 for activations"):
        run_grid(grid(), cache, tmp_path, workers=2)
    assert len(run_grid(grid()[1:], cache, tmp_path)) == 2


def test_records_of_another_cache_are_refused_before_training(
    folder: Path, tmp_path: Path
):
    cache = ActivationCache.open(folder, CACHE)
    run_grid(grid()[1:2], cache, tmp_path)
    smaller = CacheSettings(train_tokens=1_400, test_tokens=200)
    with pytest.raises(ValueError, match="made with train_tokens=1500, now it would"):
        run_grid(grid(), ActivationCache.open(folder, smaller), tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_records_of_another_text_are_refused_before_training(tmp_path: Path):
    x = torch.randn(700, 12, generator=torch.Generator().manual_seed(0))
    first = ActivationCache(Activations([x]), Activations([x[:300]]))
    other = ActivationCache(Activations([x]), Activations([x[300:600]]))
    run_grid(grid()[1:2], first, tmp_path)
    with pytest.raises(ValueError, match="must be measured on one text, but the var"):
        run_grid(grid()[1:], other, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    rounded = ActivationCache(Activations([x]), Activations([x[:300].bfloat16()]))
    assert len(run_grid(grid()[1:], rounded, tmp_path)) == 2


def test_records_of_other_training_text_are_refused_before_training(
    folder: Path, tmp_path: Path
):
    run_grid(grid()[1:2], ActivationCache.open(folder, CACHE), tmp_path / "runs")
    other = tmp_path / "cache"
    shutil.copytree(folder, other)
    file = other / "train" / "00000.safetensors"
    shard = load_file(file)
    save_file({**shard, "token_ids": shard["token_ids"] + 1}, file)
    cache = ActivationCache.open(other, CACHE)
    with pytest.raises(ValueError, match=r"was made with texts=\{'train': '"):
        run_grid(grid()[1:2], cache, tmp_path / "runs")
    with pytest.raises(ValueError, match=r"k4-s0-.*json is of other tokens \(\{'train"):
        run_grid(grid()[2:], cache, tmp_path / "runs")
    assert len(list((tmp_path / "runs").iterdir())) == 1

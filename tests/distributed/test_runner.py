"""The training command under torchrun: real processes, model, text and files."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from cache.runs import cache
from cli.runs import train_command
from distributed import runners
from distributed.launch import checkpoints, finish, torchrun
from distributed.processes import Processes
from sae_lens import SAE, HookedSAETransformer
from safetensors.torch import load_file

from sae_lens_scale.cli import main

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("processes", "experts"), [(2, 1), (3, 3)])
def test_the_command_trains_on_several_processes_what_it_trains_on_one(
    processes: int,
    experts: int,
    tiny_llama: Path,
    text_folder: Path,
    trained_on_one: Path,
    tmp_path: Path,
):
    command = train_command("scale", tiny_llama, text_folder, tmp_path)
    command += f" --expert_parallel {experts}"
    _, err = finish(torchrun(processes, command))
    # One process shows progress, and says how to go on.
    assert err.count("Training SAE: 100%") <= 1
    assert err.count("next: sae-lens-scale evaluate") == 1
    folder = tmp_path / "sae"
    one = trained_on_one / "sae"
    assert {f.name for f in folder.iterdir()} == {f.name for f in one.iterdir()}
    tensors, of_one = (load_file(f / "sae_weights.safetensors") for f in (folder, one))
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in of_one.items()
    }
    cfg, cfg_of_one = (json.loads((f / "cfg.json").read_text()) for f in (folder, one))
    assert cfg.keys() == cfg_of_one.keys()
    assert cfg["device"] == cfg_of_one["device"]
    assert 4 < cfg["metadata"]["l0"] < 8.001
    # One folder of checkpoints, whose middle one is an ordinary one.
    (middle,) = checkpoints(tmp_path)
    ordinary = SAE.load_from_disk(folder)
    assert ordinary(torch.randn(3, 32)).isfinite().all()
    resumed = tmp_path / "resumed"
    again = train_command("scale", tiny_llama, text_folder, resumed)
    assert main([*again.split(), "--resume_from_checkpoint", str(middle)]) == 0
    assert (resumed / "sae" / "cfg.json").exists()


@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_all_processes_begin_with_the_weights_that_the_first_one_made(
    processes: Callable[[int], Processes], tiny_llama: Path, expert_parallel: int
):
    results = processes(2).run(runners.start_of_run, tiny_llama, expert_parallel)
    (made, whole), others = results
    assert others == [None, None]
    torch.testing.assert_close(whole, made, rtol=0, atol=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_every_row_of_the_text_is_read_by_one_process(
    processes: Callable[[int], Processes], tiny_llama: Path, streaming: bool
):
    texts = [f"{i} " * 30 for i in range(31)]
    # Null text is passed over.
    results = processes(3).run(
        runners.rows_to_read, tiny_llama, [*texts, None], streaming
    )
    read = [text for rows, _ in results for text in rows]
    assert sorted(read) == sorted(texts)
    assert all(len(rows) >= 10 for rows, _ in results)
    assert [tokens for _, tokens in results] == [21, 21, 22]


@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_an_evaluation_is_the_mean_over_processes(
    processes: Callable[[int], Processes], tiny_llama: Path, expert_parallel: int
):
    first, second = processes(2).run(runners.evaluations, tiny_llama, expert_parallel)
    assert first == second
    # After the fourth and the eighth step.
    assert len(first) == 2
    for metrics in first:
        assert 0 < metrics["sparsity"]["l0"] < 8.001
        assert metrics["model_performance_preservation"]["ce_loss_without_sae"] > 0


@pytest.mark.parametrize("expert_parallel", [1, 3])
def test_batches_of_a_cache_are_shared_out(
    processes: Callable[[int], Processes],
    expert_parallel: int,
    tiny_model: HookedSAETransformer,
    tmp_path: Path,
):
    folder = tmp_path / "activations"
    cache(folder, tiny_model)
    (one,) = processes(1).run(runners.train_on_cache, folder, 1)
    settings = {"n_checkpoints": 1, "checkpoint_path": str(tmp_path / "checkpoints")}
    train = partial(runners.train_on_cache, **settings)
    first, *others = processes(3).run(train, folder, expert_parallel)
    assert others == [None, None]
    torch.testing.assert_close(first, one, atol=1e-6, rtol=1e-5)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*/*")
    train = partial(runners.train_on_cache, resume_from_checkpoint=str(checkpoint))
    resumed, *_ = processes(3).run(train, folder, expert_parallel)
    torch.testing.assert_close(resumed, first, atol=0, rtol=0)

"""Refusals of several processes: the same on all of them, before anything hangs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cache.runs import cache
from datasets import Array2D, Dataset, Features
from distributed import refusals
from distributed.processes import Processes
from sae_lens import HookedSAETransformer, LoggingConfig, StandardTrainingSAEConfig

pytestmark = pytest.mark.slow

AMONG = "where experts are shared out among processes"
OF_THE_BATCH = (
    "selection must be one of each token where several processes share out a batch, got "
    "_OfTheBatch's, with per_token=False"
)


def the_same(results: list[Any]) -> Any:
    assert all(result == results[0] for result in results)
    return results[0]


def test_no_hook_point_can_be_hooked(processes: Callable[[int], Processes]):
    found = the_same(processes(2).run(refusals.of_hooks, 2))
    assert len(found) > 6
    for name, before, after in found:
        assert (
            before
            == after
            == (f"{name} must have no hook {AMONG}, none of which sees a whole batch")
        )


def test_saes_whose_experts_cannot_be_shared_out(
    processes: Callable[[int], Processes],
):
    results = processes(4).run(refusals.of_saes, 4)
    # The function's address differs.
    selections = [result.pop("selection") for result in results]
    assert all(
        text.startswith(f"selection must be a TopK of each token {AMONG}, got <")
        for text in selections
    )
    errors = the_same(results)
    assert errors == {
        "decode": f"decode must not be overridden {AMONG}, got _Decodes",
        "encode_with_hidden_pre": f"encode_with_hidden_pre must not be overridden {AMONG}, "
        "got _EncodesWithHiddenPre",
        "a call": "encode_with_hidden_pre and a hook on hook_sae_acts_pre need "
        f"pre-activations that no process has {AMONG}",
        "use_sparse_activations": f"use_sparse_activations must be True {AMONG}, got False",
        "num_experts": "expert_parallel must be at most the 2 experts that are not shared, "
        "got 4",
        "the batch": OF_THE_BATCH,
    }


def test_a_selection_from_the_whole_batch_which_no_process_has(
    processes: Callable[[int], Processes],
):
    errors = the_same(processes(2).run(refusals.of_saes, 1))
    assert errors.pop("the batch") == OF_THE_BATCH
    # Of each token's latents all are here.
    assert set(errors.values()) == {"nothing was refused"}


@pytest.mark.parametrize(
    ("by_rank", "error"),
    [
        ([{"lr": 0.1}, {"lr": 0.2}], "lr {} 0.1 {} 0.2 {}"),
        ([{"sae": {"k": 4}}, {}], "k {} 4 {} 8 {}"),
        ([{}, {"training_tokens": 320}], "training_tokens {} 640 {} 320 {}"),
        (
            [{}, {"sae": {"aux_loss_coefficient": 0.5}}],
            "aux_loss_coefficient {} 0.125 {} 0.5 {}",
        ),
        ([{"dtype": "bfloat16"}, {}], "dtype {} 'bfloat16' {} 'float32' {}"),
        (
            [{"output_path": "out"}, {"output_path": None}],
            "output_path is None {} False {} True {}",
        ),
        ([{}, {"expert_parallel": 2}], "expert_parallel {} 1 {} 2 {}"),
        (
            [{"logger": LoggingConfig()}, {}],
            "log_to_wandb {} True {} False {}",
        ),
    ],
)
def test_settings_that_differ_are_refused_before_the_model_is_loaded(
    processes: Callable[[int], Processes], by_rank: list[dict[str, Any]], error: str
):
    assert the_same(processes(2).run(refusals.of_settings, by_rank)) == error.format(
        "must be the same on all processes, got",
        "on the first and",
        "on that of rank 1",
    )


def test_caches_of_other_lengths(
    processes: Callable[[int], Processes],
    tiny_model: HookedSAETransformer,
    tmp_path: Path,
):
    for rank, tokens in enumerate((1_000, 2_000)):
        cache(tmp_path / str(rank), tiny_model, tokens)
    error = the_same(processes(2).run(refusals.of_caches, tmp_path))
    assert error.startswith(
        "number of tokens in cached_activations_path must be the same on all processes, got"
    )


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (
            {"expert_parallel": 3},
            "expert_parallel must divide the number of processes, 4, got 3",
        ),
        (
            {
                "expert_parallel": 4,
                "sae": {"experts_per_token": 3, "num_shared_experts": 1},
            },
            "expert_parallel must be at most the 3 experts that are not shared, got 4",
        ),
        (
            {"expert_parallel": 2, "sae": {"use_sparse_activations": False}},
            f"use_sparse_activations must be True {AMONG}, got False",
        ),
        (
            {"sae": StandardTrainingSAEConfig(d_in=32, d_sae=128)},
            "architecture must be scale or switch, to be trained by several processes, got "
            "standard",
        ),
        (
            {"expert_parallel": 2.0},
            "expert_parallel must divide the number of processes, 4, got 2.0",
        ),
        (
            {"override_dataset": [{"text": "of a list"}]},
            "override_dataset must be a Dataset or an IterableDataset with several processes, "
            "got list",
        ),
        (
            {"train_batch_size_tokens": 257 * 4},
            "n_batches_in_buffer must be so many contexts of 16 tokens that they hold the 257 "
            "of each process, of train_batch_size_tokens=1028, got 16",
        ),
        (
            {"compile_sae": True},
            "compile_sae must be False with several processes, got True",
        ),
        (
            {"train_batch_size_tokens": 3},
            "train_batch_size_tokens must be at least the 4 processes, got 3",
        ),
    ],
    ids=str,
)
def test_runs_are_refused_before_the_model_is_loaded(
    processes: Callable[[int], Processes], settings: dict[str, Any], error: str
):
    results = processes(4).run(refusals.of_runner, "no-such-model", settings)
    assert the_same(results) == error


def test_a_device_that_no_process_has(processes: Callable[[int], Processes]):
    # NCCL and torch's choice of a GPU would fail in words of their own.
    error = the_same(processes(2).run(refusals.of_runner, "", {"device": "cuda:99"}))
    assert error.startswith("device 'cuda:99' cannot be used: ")


def test_an_sae_that_has_been_shared_out(processes: Callable[[int], Processes]):
    for expert_parallel in (1, 2):
        errors = the_same(processes(2).run(refusals.of_shared_out, expert_parallel))
        assert set(errors) == {
            "the SAE has been shared out among processes by an earlier run, whose run() "
            "returned the trained one on the first process: each run needs an SAE of its own"
        }


def test_a_runner_that_has_run(processes: Callable[[int], Processes], tiny_llama: Path):
    error = the_same(processes(2).run(refusals.of_second_run, tiny_llama))
    assert error.startswith("the SAE has been shared out among processes by an earlier")


def test_a_share_of_the_text_that_fills_no_prompt(
    processes: Callable[[int], Processes], tiny_llama: Path
):
    rows = [f"{i} " * 30 if i % 2 == 0 else "short" for i in range(4)]
    settings = {"override_dataset": Dataset.from_dict({"text": rows})}
    first, second = processes(2).run(refusals.of_runner, tiny_llama, settings)
    assert first == "nothing was refused"
    assert second == (
        "the share that each of 2 processes reads of override_dataset must hold a prompt of "
        "16 tokens at least, got less"
    )


def test_a_text_needs_a_row_for_each_process(
    processes: Callable[[int], Processes], tiny_llama: Path
):
    results = processes(4).run(refusals.of_runner, tiny_llama, {"rows": 3})
    error = "the text must have a row for each of the 4 processes, got 3"
    assert the_same(results) == error


def test_cached_activations_need_a_batch_for_each_process(
    processes: Callable[[int], Processes], tiny_llama: Path, tmp_path: Path
):
    columns = {"model.layers.0": Array2D((16, 32), "float32")}
    rows = {"model.layers.0": torch.zeros(7, 16, 32).tolist()}
    Dataset.from_dict(rows, Features(columns)).save_to_disk(tmp_path)
    settings = {
        "use_cached_activations": True,
        "cached_activations_path": str(tmp_path),
    }
    results = processes(2).run(refusals.of_runner, tiny_llama, settings)
    assert the_same(results) == (
        "cached_activations_path must have 4 rows, a batch, for each of the 2 processes, got 7"
    )

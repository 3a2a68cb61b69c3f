"""Training on a cache with the real runner: same batches, exact resumption, refusals."""

import json
import os
import re
import shutil
import signal
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from cache.runs import TOKENS, cache, cached_config, text
from integration.runs import (
    NORMALIZED,
    WITHOUT_START,
    assert_same_weights,
    both_architectures,
    no_wandb,
    weights,
)
from sae_lens import HookedSAETransformer
from sae_lens.training._interruption import InterruptedException

from sae_lens_scale.cache.manifest import MANIFEST
from sae_lens_scale.cache.reading import map_shards
from sae_lens_scale.runner import InterruptibleTrainingRunner


@pytest.fixture(scope="module")
def folder(
    tiny_model: HookedSAETransformer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A cache."""
    folder = tmp_path_factory.mktemp("cache") / "activations"
    cache(folder, tiny_model)
    return folder


def make(folder: Path, **settings: Any) -> InterruptibleTrainingRunner:
    """A runner that is given neither a model nor a text."""
    torch.manual_seed(0)
    return InterruptibleTrainingRunner(cached_config(folder, **settings))


def record(
    runner: InterruptibleTrainingRunner, terminate_in: int | None = None
) -> list[torch.Tensor]:
    """Keep each step's batch; this process gets a SIGTERM in one of the steps."""
    batches: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor, *, hook: Any) -> None:
        batches.append(tensor.detach().clone())
        if len(batches) == terminate_in:
            os.kill(os.getpid(), signal.SIGTERM)

    runner.sae.hook_sae_input.add_hook(keep)
    return batches


def test_every_token_is_trained_on_once_an_epoch(folder: Path):
    runner = make(folder, sae={"normalize_activations": "none"})
    batches = record(runner)
    runner.run()
    cached = torch.cat([shard["activations"] for shard in map_shards(folder)])
    rows = torch.cat(batches)[: len(cached)]
    assert len(batches) == 60 and len(cached) < 60 * 256
    order = lambda x: x[x[:, 0].sort(stable=True).indices, 0]
    assert torch.equal(order(rows), order(cached.float()))


@both_architectures
@pytest.mark.parametrize(
    ("stop", "settings"),
    [
        (7, {"sae": {**WITHOUT_START, **NORMALIZED}}),
        # The last step of the first epoch, and one in the fourth.
        (12, {"sae": WITHOUT_START, "prefetch_llm_batches": 3}),
        (41, {"sae": {**WITHOUT_START, **NORMALIZED}, "prefetch_llm_batches": True}),
    ],
    ids=["early", "prefetching", "late"],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped(
    stop: int,
    settings: dict[str, Any],
    architecture: str,
    folder: Path,
    tmp_path: Path,
    tiny_model: HookedSAETransformer,
):
    settings = {**settings, "architecture": architecture}
    folder = shutil.copytree(folder, tmp_path / "cache")
    whole = make(folder, **settings)
    want = record(whole)
    trained = weights(whole.run())

    checkpoints = tmp_path / "checkpoints"
    stopped = make(folder, **settings, checkpoint_path=str(checkpoints))
    batches = record(stopped, terminate_in=stop)
    with pytest.raises(InterruptedException):
        stopped.run()
    (checkpoint,) = checkpoints.glob("*/*")
    assert len(batches) == stop
    # The run goes on with the tokens that there were.
    assert cache(folder, tiny_model, TOKENS + 512) > TOKENS + 500
    resumed = make(folder, **settings, resume_from_checkpoint=str(checkpoint))
    rest = record(resumed)
    got = weights(resumed.run())
    assert len(rest) == 60 - stop
    assert torch.equal(torch.stack(batches + rest), torch.stack(want))
    assert_same_weights(got, trained)


def test_a_run_that_goes_on_keeps_the_order_of_its_tokens(folder: Path, tmp_path: Path):
    settings: dict[str, Any] = {"sae": NORMALIZED, "n_checkpoints": 1}
    make(folder, **settings, checkpoint_path=str(tmp_path)).run()
    (checkpoint,) = tmp_path.glob("*/*")
    settings["resume_from_checkpoint"] = str(checkpoint)
    for name, before, other in (
        ("seed", 42, 7),
        ("n_batches_in_buffer", 16, 32),
        ("n_batches_for_norm_estimate", 4, 5),
    ):
        message = f"^{name} must be {before}, as in .*, got {other}"
        with pytest.raises(ValueError, match=message):
            make(folder, **settings, **{name: other})


def test_the_SAE_names_the_model_and_text_that_were_cached(
    folder: Path, tmp_path: Path
):
    runner = make(folder, training_tokens=512, output_path=str(tmp_path))
    cfg = runner.cfg
    metadata = runner.run().cfg.metadata
    assert (metadata.model_name, metadata.dataset_path) == ("tiny", "some text")
    assert metadata.exclude_special_tokens is True
    saved = json.loads((tmp_path / "runner_cfg.json").read_text())
    assert saved["cached_activations_path"] == str(folder)
    assert saved["use_cached_activations"] is cfg.use_cached_activations is True


def test_evaluations_run_the_model_on_the_text(
    folder: Path, tiny_model: HookedSAETransformer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = no_wandb()
    logger.log_to_wandb = True
    logger.wandb_log_frequency, logger.eval_every_n_wandb_logs = 1, 3
    cfg = cached_config(folder, training_tokens=4 * 256, logger=logger)
    cfg.n_eval_batches, cfg.eval_batch_size_prompts = 2, 2
    runner = InterruptibleTrainingRunner(cfg, text(), tiny_model)
    evaluator, found = runner.evaluator, []

    def evaluate(*arguments: Any, **kwargs: Any) -> Any:
        found.append(deepcopy(evaluator(*arguments, **kwargs)))
        return found[-1]

    monkeypatch.setattr(runner, "evaluator", evaluate)
    runner.run()
    (metrics,) = found
    assert metrics["model_performance_preservation"]["ce_loss_without_sae"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_name": "other"}, "^model_name must be 'tiny', .*, got 'other'"),
        ({"hook_name": "blocks.1.hook_resid_post"}, "^hook_name must be 'blocks.0"),
        ({"context_size": 64}, "^context_size must be 32, .*, got 64"),
        ({"sae": {"d_in": 64}}, "^d_in must be 32, .*, got 64"),
        ({"autocast_lm": True}, "^autocast_lm must be False, .*, got True"),
        ({"exclude_special_tokens": False}, "^exclude_special_tokens must be True"),
        ({"seqpos_slice": (1, None)}, r"^seqpos_slice must be \[None\], .*\[1, None\]"),
        (
            {"train_batch_size_tokens": 4_096, "n_batches_in_buffer": 200},
            "^train_batch_size_tokens must be at most the 3[0-9]{3} tokens in .*, got 4096",
        ),
        ({"seed": -1}, "^seed must be an integer of at least 0, got -1"),
        (
            {"model_from_pretrained_kwargs": {"dtype": torch.float16}},
            "^model_from_pretrained_kwargs cannot be kept with a cache: ",
        ),
    ],
    ids=str,
)
def test_runs_that_do_not_suit_the_cache_are_refused(
    settings: dict[str, Any], message: str, folder: Path
):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        make(folder, **settings)
    assert "\n" not in str(error.value)


def test_damaged_caches_are_refused(folder: Path, tmp_path: Path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    manifest = json.loads((copied / MANIFEST).read_text())
    shards = sorted(copied.glob("*.safetensors"))
    shards[-1].unlink()
    message = (
        f"{re.escape(str(copied))} must hold {manifest['tokens']} tokens, got [0-9]+: a"
    )
    with pytest.raises(ValueError, match=message):
        make(copied)
    for text_of_manifest, message in (
        (json.dumps(manifest | {"tokens": 0}), "copy is not finished: cache again"),
        ("{}", "manifest.json must say how many tokens there are"),
        ("no JSON", "manifest.json is not JSON"),
        ('{"tokens": 9999}', "manifest.json must say model_name, got none"),
    ):
        (copied / MANIFEST).write_text(text_of_manifest)
        with pytest.raises(ValueError, match=message):
            make(copied)

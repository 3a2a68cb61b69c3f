"""Interrupted runs go on bit by bit; damaged checkpoints are refused; saving is whole."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import files_no_larger_than, small_corpus, step_input
from integration.runs import (
    ARCHITECTURES,
    IN_STEP,
    WITHOUT_START,
    assert_same_weights,
    both_architectures,
    make_runner,
    multi_runner,
    runner_config,
    sae_config,
    weights,
)
from sae_lens import HookedSAETransformer, LanguageModelSAETrainingRunner
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATION_WHITENING_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.training._interruption import InterruptedException
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file

from sae_lens_scale.runner import InterruptibleTrainingRunner


@pytest.fixture(scope="module")
def tokens(tiny_model: HookedSAETransformer) -> Dataset:
    """Rows of exactly one context."""
    assert tiny_model.tokenizer is not None
    text = "\n".join(small_corpus()["text"])
    ids = torch.tensor(tiny_model.tokenizer(text[:50_000])["input_ids"])
    rows = ids[: len(ids) // 32 * 32].view(-1, 32)
    return Dataset.from_dict({"input_ids": rows.tolist()})


def record_losses(
    sae: TrainingSAE[Any], terminate_in: int | None = None
) -> list[dict[str, float]]:
    """
    Have every training step leave its losses in the list that is returned.

    This process gets a SIGTERM in step ``terminate_in``, the first being 1.
    """
    losses: list[dict[str, float]] = []
    step = sae.training_forward_pass

    def recording(**kwargs: Any) -> Any:
        if len(losses) + 1 == terminate_in:
            os.kill(os.getpid(), signal.SIGTERM)
        output = step(**kwargs)
        losses.append({name: loss.item() for name, loss in output.losses.items()})
        return output

    sae.training_forward_pass = recording  # type: ignore[method-assign]
    return losses


def in_step_runner(
    sae: Any,
    model: HookedSAETransformer,
    tokens: Dataset,
    runner_class: Any = LanguageModelSAETrainingRunner,
    **overrides: Any,
) -> LanguageModelSAETrainingRunner:
    """A runner that can continue bit by bit: 16 steps, one context a row of the data."""
    settings = {**IN_STEP, "is_dataset_tokenized": True, **overrides}
    # A copy, since runners write to the metadata.
    cfg = runner_config(copy.deepcopy(sae), **settings)
    return make_runner(cfg, model, tokens, runner_class=runner_class)


@both_architectures
@pytest.mark.parametrize(
    "normalization", ["none", "expected_average_only_in", "covariance_whitening"]
)
def test_a_run_stopped_by_a_signal_continues_bit_equal(
    architecture: str,
    normalization: str,
    tiny_model: HookedSAETransformer,
    tokens: Dataset,
    tmp_path: Path,
):
    norm = {"normalize_activations": normalization}
    cfg = sae_config(architecture, **norm, **WITHOUT_START)
    runner = partial(in_step_runner, cfg, tiny_model, tokens)
    whole = runner()
    want_losses = record_losses(whole.sae)
    want = weights(whole.run())

    stopped = runner(InterruptibleTrainingRunner, checkpoint_path=str(tmp_path))
    losses = record_losses(stopped.sae, terminate_in=7)
    with pytest.raises(InterruptedException):
        stopped.run()
    assert losses == want_losses[:7]

    (checkpoint,) = tmp_path.glob("*/*")
    resumed = runner(resume_from_checkpoint=str(checkpoint))
    losses = record_losses(resumed.sae)
    got = weights(resumed.run())
    assert losses == want_losses[7:]
    # At first the checkpoint says which latents are dead.
    assert any(loss["auxiliary_reconstruction_loss"] > 0 for loss in losses)
    assert_same_weights(got, want)


def test_a_run_goes_on_bit_equal_while_a_thread_reads_ahead(
    tiny_model: HookedSAETransformer, tokens: Dataset, tmp_path: Path
):
    # SAELens's own runner passes over the text while its thread reads it.
    cfg = sae_config("scale", **WITHOUT_START)
    runner = partial(in_step_runner, cfg, tiny_model, tokens)
    runner_class = InterruptibleTrainingRunner
    whole = runner(runner_class, n_checkpoints=1, checkpoint_path=str(tmp_path))
    want = weights(whole.run())
    (checkpoint,) = tmp_path.glob("*/*")
    resumed = runner(
        runner_class,
        resume_from_checkpoint=str(checkpoint),
        prefetch_llm_batches=4,
    )
    assert_same_weights(weights(resumed.run()), want)


def test_a_killed_process_leaves_a_checkpoint_that_continues_bit_equal(
    tiny_llama: Path, tokens: Dataset, tmp_path: Path
):
    model, data, checkpoints = str(tiny_llama), str(tmp_path / "tokens"), tmp_path / "c"
    tokens.save_to_disk(data)
    code = f"""
from integration.runs import multi_runner
runner = multi_runner({model!r}, {data!r}, {str(checkpoints)!r})
runner.saes["switch"].hook_sae_input.add_hook(lambda tensor, hook: print("step", flush=True))
runner.run()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    # The checkpoint is written after the ninth step.
    for _ in range(11):
        assert process.stdout.readline() == b"step\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL

    whole = multi_runner(model, data, None)
    want_losses = {name: record_losses(sae) for name, sae in whole.saes.items()}
    want = {name: weights(sae) for name, sae in whole.run().items()}
    (checkpoint,) = checkpoints.glob("*/*")
    resumed = multi_runner(model, data, None, str(checkpoint))
    losses = {name: record_losses(sae) for name, sae in resumed.saes.items()}
    for name, sae in resumed.run().items():
        assert losses[name] == want_losses[name][9:]
        assert_same_weights(weights(sae), want[name])


def test_a_resumed_run_has_the_batches_of_a_resumed_TopK_SAE(
    tiny_model: HookedSAETransformer, tmp_path: Path
):
    # SAELens saves neither its mixing buffer nor its place in half-read documents.
    batches: dict[str, list[torch.Tensor]] = {}
    for architecture in ("topk", *ARCHITECTURES):
        seen = batches[architecture] = []

        def run(**overrides: Any) -> None:
            cfg = runner_config(
                sae_config(architecture), training_tokens=10 * 256, **overrides
            )
            runner = make_runner(cfg, tiny_model)
            runner.sae.hook_sae_input.add_hook(
                lambda tensor, hook: seen.append(tensor.clone())
            )
            torch.manual_seed(0)
            runner.run()

        run(checkpoint_path=str(tmp_path / architecture), n_checkpoints=1)
        (checkpoint,) = (tmp_path / architecture).glob("*/*")
        run(resume_from_checkpoint=str(checkpoint))
        assert len(seen) == 10 + 4
    for architecture in ARCHITECTURES:
        torch.testing.assert_close(
            batches[architecture], batches["topk"], atol=0, rtol=0
        )


@both_architectures
def test_a_training_step_draws_no_random_numbers(architecture: str):
    # Their state is not in a checkpoint.
    sae = TrainingSAE.from_dict(sae_config(architecture).to_dict())
    x = torch.randn(64, 32)
    before = torch.get_rng_state()
    sae.training_forward_pass(step_input(x, torch.arange(128) % 2 == 0)).loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def good_checkpoint(
    request: pytest.FixtureRequest,
    tiny_model: HookedSAETransformer,
    tokens: Dataset,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    in_step_runner(
        sae_config(request.param, normalize_activations="covariance_whitening"),
        tiny_model,
        tokens,
        checkpoint_path=str(folder),
        n_checkpoints=1,
    ).run()
    (checkpoint,) = folder.glob("*/*")
    return checkpoint


@pytest.fixture
def checkpoint(good_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(good_checkpoint, tmp_path / "checkpoint")


def live_sae(checkpoint: Path, **overrides: Any) -> TrainingSAE[Any]:
    """An SAE with the settings of a checkpoint, but not its weights."""
    cfg = json.loads((checkpoint / SAE_CFG_FILENAME).read_text())
    torch.manual_seed(1)
    return TrainingSAE.from_dict({**cfg, **overrides})


def assert_refused(sae: TrainingSAE[Any], checkpoint: Path, message: str) -> None:
    """The weights do not load, with this error, and the SAE keeps its own."""
    before = weights(sae)
    file = re.escape(str(checkpoint / SAE_WEIGHTS_FILENAME))
    with pytest.raises(ValueError, match=f"{file} cannot be loaded: .*{message}"):
        sae.load_weights_from_checkpoint(checkpoint)
    assert_same_weights(weights(sae), before)


def assert_loads_nowhere(
    checkpoint: Path, error: type[Exception], message: str, disk_too: bool = True
) -> None:
    """Neither from disk nor into an SAE that is there already."""
    for sae_class in (SAE, TrainingSAE) if disk_too else ():
        with pytest.raises(error, match=message):
            sae_class.load_from_disk(checkpoint)
    assert_refused(live_sae(checkpoint), checkpoint, message)


def test_an_undamaged_checkpoint_loads(checkpoint: Path):
    want = load_file(checkpoint / SAE_WEIGHTS_FILENAME)
    sae = live_sae(checkpoint)
    sae.load_weights_from_checkpoint(checkpoint)
    assert_same_weights(sae.state_dict(), want)
    assert_same_weights(TrainingSAE.load_from_disk(checkpoint).state_dict(), want)
    SAE.load_from_disk(checkpoint)


def test_weights_that_are_cut_short_or_something_else_are_refused(checkpoint: Path):
    file = checkpoint / SAE_WEIGHTS_FILENAME
    whole = file.read_bytes()
    lengths = (0, 4, 8, 100, len(whole) // 2, len(whole) - 1)
    for content in (*(whole[:n] for n in lengths), b"<!DOCTYPE html>" * 100):
        file.write_bytes(content)
        assert_loads_nowhere(checkpoint, SafetensorError, "deserializing header")


def test_tensors_that_do_not_fit_are_named(checkpoint: Path):
    file = checkpoint / SAE_WEIGHTS_FILENAME
    tensors = load(file.read_bytes())
    for name, tensor in tensors.items():
        save_file({n: t for n, t in tensors.items() if n != name}, file)
        # An inference export has no omega either: from disk, this one looks like it.
        message = f"{name} is missing"
        assert_loads_nowhere(checkpoint, ValueError, message, name != "omega")

        save_file({**tensors, name: tensor[1:].contiguous()}, file)
        shapes = rf"\({len(tensor)},.*\), got \({len(tensor) - 1},"
        message = f"{name} must have shape {shapes}"
        assert_loads_nowhere(checkpoint, ValueError, message)

    save_file({**tensors, "threshold": torch.zeros(128)}, file)
    assert_loads_nowhere(checkpoint, ValueError, "threshold is not part of it")

    save_file({**tensors, "W_dec": torch.ones(128, 32, dtype=torch.int32)}, file)
    # Reading from disk, SAELens makes them floating point before anybody can look.
    message = "W_dec must be of floating point, got torch.int32"
    assert_loads_nowhere(checkpoint, ValueError, message, disk_too=False)


@pytest.mark.parametrize(
    ("architecture", "overrides", "message"),
    [
        ("topk", {}, "W_router is missing"),
        ("standard", {}, "W_router is missing"),
        ("gated", {}, "b_enc is missing"),
        ("scale", {"num_experts": 8}, "W_router must have shape (32, 4), got (32, 8)"),
        ("scale", {"decomposition": "learned"}, "W_low_pass is not part of it"),
        ("switch", {"num_experts": 2}, "W_router must have shape (32, 4), got (32, 2)"),
        ("switch", {"d_sae": 64}, "b_enc must have shape (128,), got (64,)"),
        ("switch", {"d_in": 16}, "b_dec must have shape (32,), got (16,)"),
    ],
)
def test_weights_of_another_SAE_are_refused(
    architecture: str, overrides: dict[str, Any], message: str, checkpoint: Path
):
    cfg = sae_config("topk").to_dict() | {"architecture": architecture}
    if architecture in ARCHITECTURES:
        cfg["num_experts"] = 4
    other = TrainingSAE.from_dict({**cfg, **overrides})
    save_file(dict(other.state_dict()), checkpoint / SAE_WEIGHTS_FILENAME)
    assert_loads_nowhere(checkpoint, ValueError, re.escape(message))


def test_omegas_are_refused_where_there_is_no_feature_scaling(tmp_path: Path):
    TrainingSAE.from_dict(sae_config("scale").to_dict()).save_model(tmp_path)
    for overrides in ({"architecture": "switch"}, {"feature_scaling": False}):
        sae = live_sae(tmp_path, **overrides)
        assert_refused(sae, tmp_path, "omega is not part of it")


def test_a_damaged_config_is_refused(checkpoint: Path):
    file = checkpoint / SAE_CFG_FILENAME
    whole = file.read_bytes()
    damaged: list[tuple[bytes, type[Exception], str]] = [
        (whole[:length], json.JSONDecodeError, "line 1")
        for length in (0, 1, len(whole) // 2, len(whole) - 1)
    ]
    damaged += [
        (b"\xff\xfe", UnicodeDecodeError, "invalid start byte"),
        (b"null", TypeError, "NoneType"),
        (b"{}", KeyError, "dtype"),
        (whole.replace(b'"k": 6', b'"k": "6"'), ValueError, "k must be .*, got '6'"),
        (
            whole.replace(b'"num_experts": 4', b'"num_experts": 8'),
            ValueError,
            r"num_experts=8: W_router must have shape \(32, 8\), got \(32, 4\)",
        ),
    ]
    for content, error, message in damaged:
        file.write_bytes(content)
        for sae_class in (SAE, TrainingSAE):
            with pytest.raises(error, match=message):
                sae_class.load_from_disk(checkpoint)


def test_missing_files_are_named(checkpoint: Path):
    for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
        (checkpoint / name).rename(checkpoint / "elsewhere")
        for sae_class in (SAE, TrainingSAE):
            with pytest.raises(FileNotFoundError, match=name):
                sae_class.load_from_disk(checkpoint)
        (checkpoint / "elsewhere").rename(checkpoint / name)
    sae = live_sae(checkpoint)
    (checkpoint / SAE_WEIGHTS_FILENAME).unlink()
    with pytest.raises(FileNotFoundError, match=SAE_WEIGHTS_FILENAME):
        sae.load_weights_from_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (TRAINER_STATE_FILENAME, (OSError, RuntimeError)),
        (ACTIVATION_SCALER_CFG_FILENAME, json.JSONDecodeError),
        (ACTIVATION_WHITENING_FILENAME, SafetensorError),
        (SAE_WEIGHTS_FILENAME, ValueError),
    ],
)
def test_a_run_does_not_resume_from_a_damaged_checkpoint(
    name: str,
    error: Any,
    checkpoint: Path,
    tiny_model: HookedSAETransformer,
    tokens: Dataset,
):
    runner = in_step_runner(
        live_sae(checkpoint).cfg,
        tiny_model,
        tokens,
        resume_from_checkpoint=str(checkpoint),
    )
    before = weights(runner.sae)
    file = checkpoint / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(error):
        runner.run()
    # Without the whitening's file, SAELens takes it that there was no whitening.
    if name != ACTIVATION_WHITENING_FILENAME:
        file.unlink()
        with pytest.raises(FileNotFoundError, match=name):
            runner.run()
    assert_same_weights(weights(runner.sae), before)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@both_architectures
@pytest.mark.parametrize("save", ["save_model", "save_inference_model"])
def test_saving_replaces_both_files_or_neither(
    architecture: str, save: str, tmp_path: Path
):
    sae: Any = TrainingSAE.from_dict(sae_config(architecture).to_dict())
    paths = getattr(sae, save)(tmp_path)
    assert paths == (tmp_path / SAE_WEIGHTS_FILENAME, tmp_path / SAE_CFG_FILENAME)
    good = contents(tmp_path)
    assert set(good) == {SAE_WEIGHTS_FILENAME, SAE_CFG_FILENAME}

    sae.W_dec.data += 1
    with (
        files_no_larger_than(10_000),
        pytest.raises(SafetensorError, match="too large"),
    ):
        getattr(sae, save)(tmp_path)
    assert contents(tmp_path) == good

    # The weights still fit on the disk, the config does not.
    sae.cfg.metadata.note = "x" * 100_000
    with files_no_larger_than(80_000), pytest.raises(OSError, match="too large"):
        getattr(sae, save)(tmp_path)
    assert contents(tmp_path) == good
    sae.cfg.metadata.note = {"a set is not JSON"}
    with pytest.raises(TypeError, match="not JSON serializable"):
        getattr(sae, save)(tmp_path)
    assert contents(tmp_path) == good

    sae.cfg.metadata.note = "fits"
    getattr(sae, save)(tmp_path)
    new = contents(tmp_path)
    assert set(new) == set(good)
    assert all(new[name] != good[name] for name in good)
    assert SAE.load_from_disk(tmp_path).cfg.metadata.note == "fits"


def test_saving_where_there_is_no_folder_says_so(tmp_path: Path):
    sae = TrainingSAE.from_dict(sae_config("scale").to_dict())
    file = tmp_path / "file"
    file.write_text("in the way")
    for save in (sae.save_model, sae.save_inference_model):
        with pytest.raises(OSError, match=str(file)):
            save(file / "sae")
    assert file.read_text() == "in the way"

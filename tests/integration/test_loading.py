"""Exports and checkpoints of SAELens's runner load, and runs go on from them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_corpus
from integration.runs import TrainingRun, assert_computes_the_same, make_runner
from sae_lens import (
    SAE,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    TrainingSAE,
)
from sae_lens.saes.sae import SAEConfig, SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file

X = torch.randn(50, 32, generator=torch.Generator().manual_seed(2)) + 0.5


every_source = pytest.mark.parametrize("source", ["output", "half_way", "final"])
of_the_end = pytest.mark.parametrize("source", ["output", "final"])


def assert_same(loaded: SAE[Any], expected: SAE[Any]) -> None:
    assert_computes_the_same(loaded, expected, X)


def as_json(cfg: SAEConfig) -> dict[str, Any]:
    """The config as files hold it: tuples are lists there."""
    return json.loads(json.dumps(cfg.to_dict()))


def fold_estimated_norm(sae: SAE[Any], checkpoint: Path) -> None:
    scaler = ActivationScaler()
    scaler.load(checkpoint / "activation_scaler.json")
    assert scaler.scaling_factor is not None
    sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)


@of_the_end
def test_every_file_of_a_finished_run_loads_as_the_same_SAE(
    source: str, training_run: TrainingRun
):
    folder = getattr(training_run, source)
    trained = training_run.sae
    inference = SAE.load_from_disk(folder)
    training = TrainingSAE.load_from_disk(folder)
    assert not isinstance(inference, TrainingSAE)
    assert type(training) is type(trained)
    for loaded in (inference, training):
        want = as_json(trained.cfg)
        got = as_json(loaded.cfg)
        assert got == {name: want[name] for name in got}
        omega = getattr(trained, "omega", None)
        assert omega is None or loaded.cfg.metadata.omega == omega.tolist()
        assert_same(loaded, trained)
    # With the settings of the training, whichever file it goes on from.
    assert as_json(training.cfg) == as_json(trained.cfg)


def test_a_checkpoint_from_the_middle_of_a_run_loads_before_its_norm_is_folded(
    training_run: TrainingRun,
):
    folder = training_run.half_way
    inference, training = SAE.load_from_disk(folder), TrainingSAE.load_from_disk(folder)
    for loaded in (inference, training):
        assert loaded.cfg.normalize_activations == "expected_average_only_in"
    assert_same(inference, training)
    before = inference(X)
    for loaded in (inference, training):
        fold_estimated_norm(loaded, folder)
    assert not torch.allclose(inference(X), before, atol=1e-2)
    assert_same(inference, training)


@every_source
@pytest.mark.parametrize("sae_class", [SAE, TrainingSAE])
@pytest.mark.parametrize("dtype", [None, "float64", "bfloat16"])
def test_nothing_stays_behind_on_another_device_or_in_another_dtype(
    source: str,
    sae_class: type[SAE[Any]],
    dtype: str | None,
    training_run: TrainingRun,
):
    sae = sae_class.load_from_disk(getattr(training_run, source), dtype=dtype)
    want = getattr(torch, dtype or "float32")
    assert (sae.dtype, sae.cfg.dtype) == (want, dtype or "float32")
    assert (sae.device, sae.cfg.device) == (torch.device("cpu"), "cpu")
    for tensor in (*sae.parameters(), *sae.buffers()):
        assert (tensor.dtype, tensor.device.type) == (want, "cpu")
    # Loading starts on the meta device: a tensor that is no parameter would stay there.
    for value in vars(sae).values():
        assert not (isinstance(value, torch.Tensor) and value.is_meta)
    out = sae(X)
    assert out.dtype == want
    assert out.isfinite().all()


@every_source
def test_decoder_norms_fold_while_loading(source: str, training_run: TrainingRun):
    folder = getattr(training_run, source)
    for sae_class in (SAE, TrainingSAE):
        folded = sae_class.load_from_disk(folder, fold_W_dec_norm=True)
        torch.testing.assert_close(folded.W_dec.norm(dim=-1), torch.ones(128))
        assert_same(folded, SAE.load_from_disk(folder))


def run_again(
    run: TrainingRun, model: HookedSAETransformer, folder: Path, **changes: Any
) -> tuple[TrainingSAE[Any], Path]:
    """SAE and export of the runner once more, with changed settings."""
    cfg = dataclasses.replace(
        run.cfg,
        checkpoint_path=None,
        n_checkpoints=0,
        save_final_checkpoint=False,
        output_path=str(folder),
        **changes,
    )
    return make_runner(cfg, model).run(), folder


@every_source
def test_the_runner_goes_on_from_where_a_run_was(
    source: str,
    training_run: TrainingRun,
    tiny_model: HookedSAETransformer,
    tmp_path: Path,
):
    folder = getattr(training_run, source)
    start = SAE.load_from_disk(folder)
    if source == "half_way":
        # The runner estimates the norm again: the same, from the same first batches.
        fold_estimated_norm(start, folder)
    # Training that learns nothing ends where it starts.
    sae, output = run_again(
        training_run,
        tiny_model,
        tmp_path / "frozen",
        from_pretrained_path=str(folder),
        training_tokens=512,
        lr=0.0,
    )
    assert_same(sae, start)
    assert_same(SAE.load_from_disk(output), start)
    kept = as_json(start.cfg)["metadata"]
    for statistic in ("l0", "num_dead_features"):
        kept.pop(statistic, None)
    metadata = as_json(sae.cfg)["metadata"]
    assert kept == {name: metadata[name] for name in kept}


@torch.no_grad()
@of_the_end
def test_training_on_from_a_finished_run_improves_it(
    source: str,
    training_run: TrainingRun,
    tiny_model: HookedSAETransformer,
    tmp_path: Path,
):
    with torch.enable_grad():
        sae, output = run_again(
            training_run,
            tiny_model,
            tmp_path / "more",
            from_pretrained_path=str(getattr(training_run, source)),
        )
    _, cache = tiny_model.run_with_cache(
        small_corpus()[-1]["text"][:400], names_filter=training_run.cfg.hook_name
    )
    x = cache[training_run.cfg.hook_name][0, 1:]

    def error(some: SAE[Any]) -> float:
        return (some(x) - x).pow(2).sum().item()

    trained_on = SAE.load_from_disk(output)
    assert error(trained_on) < 0.95 * error(training_run.sae)
    torch.testing.assert_close(trained_on(x), sae(x), atol=1e-4, rtol=1e-4)
    omega = getattr(sae, "omega", None)
    assert omega is None or omega.any()


@every_source
def test_configs_on_disk_are_strict_json_and_give_the_config_back(
    source: str, training_run: TrainingRun
):
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    folder = getattr(training_run, source)
    cfg, runner_cfg = (
        json.loads((folder / name).read_text(), parse_constant=refuse)
        for name in ("cfg.json", "runner_cfg.json")
    )
    assert SAE.load_from_disk(folder).cfg.metadata == SAEMetadata(**cfg["metadata"])
    again = LanguageModelSAERunnerConfig.from_dict(runner_cfg)
    assert type(again.sae) is type(training_run.cfg.sae)
    assert json.loads(json.dumps(again.to_dict())) == runner_cfg
    sparsity = load_file(folder / "sparsity.safetensors")["sparsity"]
    assert sparsity.shape == (128,)
    assert (sparsity <= 0).all()

"""Exports and checkpoints of SAELens's runner load, and runs go on from them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
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


@pytest.fixture(params=["output", "half_way", "final"])
def source(request: pytest.FixtureRequest, training_run: TrainingRun) -> Path:
    """Folder of an export or a checkpoint."""
    return getattr(training_run, request.param)


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


@pytest.mark.parametrize("source", ["output", "final"], indirect=True)
def test_every_file_of_a_finished_run_loads_as_the_same_SAE(
    source: Path, training_run: TrainingRun
):
    trained = training_run.sae
    inference = SAE.load_from_disk(source)
    training = TrainingSAE.load_from_disk(source)
    assert not isinstance(inference, TrainingSAE)
    assert type(training) is type(trained)
    for loaded in (inference, training):
        want = as_json(trained.cfg)
        got = as_json(loaded.cfg)
        assert got == {name: want[name] for name in got}
        omega = getattr(trained, "omega", None)
        assert omega is None or loaded.cfg.metadata.omega == omega.tolist()
        assert_same(loaded, trained)
    # Either file gives back the settings of the training.
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


@pytest.mark.parametrize("sae_class", [SAE, TrainingSAE])
@pytest.mark.parametrize("dtype", [None, "float64", "bfloat16"])
def test_nothing_stays_behind_on_another_device_or_in_another_dtype(
    source: Path, sae_class: type[SAE[Any]], dtype: str | None
):
    sae = sae_class.load_from_disk(source, dtype=dtype)
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


def test_decoder_norms_fold_while_loading(source: Path):
    for sae_class in (SAE, TrainingSAE):
        folded = sae_class.load_from_disk(source, fold_W_dec_norm=True)
        torch.testing.assert_close(folded.W_dec.norm(dim=-1), torch.ones(128))
        assert_same(folded, SAE.load_from_disk(source))


def test_the_runner_goes_on_from_where_a_run_was(
    source: Path,
    training_run: TrainingRun,
    tiny_model: HookedSAETransformer,
    tmp_path: Path,
):
    start = SAE.load_from_disk(source)
    if source == training_run.half_way:
        # The runner estimates the norm again: the same, from the same first batches.
        fold_estimated_norm(start, source)
    # Training that learns nothing ends where it starts.
    cfg = dataclasses.replace(
        training_run.cfg,
        from_pretrained_path=str(source),
        checkpoint_path=None,
        n_checkpoints=0,
        save_final_checkpoint=False,
        output_path=str(tmp_path),
        training_tokens=512,
        lr=0.0,
    )
    sae = make_runner(cfg, tiny_model).run()
    assert_same(sae, start)
    assert_same(SAE.load_from_disk(tmp_path), start)
    learning = make_runner(dataclasses.replace(cfg, lr=1e-3), tiny_model).run()
    for name, parameter in learning.named_parameters():
        assert not torch.allclose(parameter, sae.get_parameter(name)), name
    kept = as_json(start.cfg)["metadata"]
    for statistic in ("l0", "num_dead_features"):
        kept.pop(statistic, None)
    metadata = as_json(sae.cfg)["metadata"]
    assert kept == {name: metadata[name] for name in kept}


def test_configs_on_disk_are_strict_json_and_give_the_config_back(
    source: Path, training_run: TrainingRun
):
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    cfg, runner_cfg = (
        json.loads((source / name).read_text(), parse_constant=refuse)
        for name in ("cfg.json", "runner_cfg.json")
    )
    assert SAE.load_from_disk(source).cfg.metadata == SAEMetadata(**cfg["metadata"])
    again = LanguageModelSAERunnerConfig.from_dict(runner_cfg)
    assert type(again.sae) is type(training_run.cfg.sae)
    assert json.loads(json.dumps(again.to_dict())) == runner_cfg
    sparsity = load_file(source / "sparsity.safetensors")["sparsity"]
    assert sparsity.shape == (128,)
    assert (sparsity <= 0).all()

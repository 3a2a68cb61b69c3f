"""Exports and training checkpoints of release 0.1.0 load and go on."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_transformer, small_corpus, step_input
from sae_lens import HookedSAETransformer, LanguageModelSAERunnerConfig
from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file
from typing_extensions import override

from sae_lens_scale.runner import InterruptibleTrainingRunner

DATA = Path(__file__).parent / "data" / "0.1.0"


@pytest.fixture(params=["scale", "switch"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Folder of one architecture's files."""
    return DATA / request.param


@pytest.fixture(scope="module")
def width_8(smollm2: HookedSAETransformer) -> HookedSAETransformer:
    """A transformer like the one of the runs that wrote the checkpoints."""
    return random_transformer(smollm2.tokenizer, n_layers=1, n_heads=2, d_head=4)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("sae_class", [SAE, TrainingSAE])
@pytest.mark.parametrize("kind", ["export", "checkpoint"])
def test_saes_load_and_compute_the_same(
    folder: Path, kind: str, sae_class: type[SAE[Any]]
):
    expected = load_file(folder / "expected.safetensors")
    sae = sae_class.load_from_disk(folder / kind)
    assert sae.cfg.architecture() == folder.name
    assert isinstance(sae, TrainingSAE) == (sae_class is TrainingSAE)
    # Routers were trained at the rate of all else.
    assert getattr(sae.cfg, "router_lr_factor", 1.0) == 1.0
    assert expected[f"{kind}_acts"].any()
    assert_same(sae.encode(expected["x"]), expected[f"{kind}_acts"])
    assert_same(sae(expected["x"]), expected[f"{kind}_out"])


def test_a_training_step_has_the_same_loss_and_gradients(folder: Path):
    expected = load_file(folder / "expected.safetensors")
    sae: Any = TrainingSAE.load_from_disk(folder / "checkpoint")
    dead = torch.arange(64) % 5 == 0
    step = sae.training_forward_pass(step_input(expected["x"], dead))
    step.loss.backward()
    assert_same(step.loss, expected["loss"])
    for name in ("W_enc", "W_dec", "W_router"):
        assert expected[f"{name}_grad"].any()
        assert_same(getattr(sae, name).grad, expected[f"{name}_grad"])


class RecordingRunner(InterruptibleTrainingRunner):
    """Runner that keeps the state that its trainer starts from, and the trainer."""

    @override
    def run_trainer_with_interruption_handling(
        self, trainer: SAETrainer[Any, Any]
    ) -> Any:
        self.trainer = trainer
        self.first_sample = trainer.n_training_samples
        self.optimizer_state = copy.deepcopy(trainer.optimizer.state_dict()["state"])
        self.start = copy.deepcopy(dict(self.sae.state_dict()))
        return super().run_trainer_with_interruption_handling(trainer)


def test_a_run_resumes_from_a_checkpoint(
    folder: Path, width_8: HookedSAETransformer, tmp_path: Path
):
    checkpoint = folder / "checkpoint"
    settings = json.loads((checkpoint / "runner_cfg.json").read_text())
    cfg = LanguageModelSAERunnerConfig.from_dict(
        settings
        | {
            "checkpoint_path": None,
            "n_checkpoints": 0,
            "output_path": str(tmp_path),
            "resume_from_checkpoint": str(checkpoint),
        }
    )
    runner = RecordingRunner(
        cfg, override_dataset=small_corpus(), override_model=width_8
    )
    assert runner.lr_factors == {"W_router": 0.1}
    runner.run()

    saved = torch.load(checkpoint / "trainer_state.pt")
    assert runner.first_sample == saved["n_training_samples"] == 9 * 256
    torch.testing.assert_close(
        runner.optimizer_state, saved["optimizer"]["state"], atol=0, rtol=0
    )
    weights = load_file(checkpoint / "sae_weights.safetensors")
    torch.testing.assert_close(runner.start, weights, atol=0, rtol=0)

    assert runner.trainer.n_training_samples == 16 * 256
    for name, tensor in SAE.load_from_disk(tmp_path).state_dict().items():
        assert tensor.isfinite().all(), name
        assert not torch.equal(tensor, weights[name]), name

"""Every runner of SAELens starts SAEs from activations, with no code of the user's."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close, small_corpus
from integration.runs import (
    ARCHITECTURES,
    HOOK,
    SHORT,
    both_architectures,
    make_runner,
    no_wandb,
    runner_config,
    sae_config,
)
from sae_lens import HookedSAETransformer
from sae_lens.multi_sae_training_runner import (
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.synthetic import SyntheticModelConfig
from sae_lens.synthetic.synthetic_sae_runner import (
    SyntheticSAERunner,
    SyntheticSAERunnerConfig,
)

from sae_lens_scale.saes.mixture import MixtureTrainingSAE
from sae_lens_scale.saes.mixture.initialization import geometric_median

NORMS = ["none", "expected_average_only_in", "covariance_whitening"]
TWO_STEPS: dict[str, Any] = {**SHORT, "training_tokens": 2 * 256}


@dataclass
class Step:
    """
    A training step of an SAE.

    Attributes:
        before: The SAE before the step.
        sae_in: The step's batch, in the trainer's units.
        after: The SAE's weights after the step's forward pass.
    """

    before: Any
    sae_in: torch.Tensor
    after: dict[str, torch.Tensor]


@dataclass
class Steps:
    """Training steps, by architecture."""

    seen: dict[str, list[Step]] = field(default_factory=dict)

    def assert_started(self, architecture: str) -> None:
        """The SAE started as from activations of one's own choice; its router went on."""
        first, second = self.seen[architecture]
        fresh = first.before
        assert not fresh.b_router.any()
        # Batches are in the trainer's units already.
        fresh.cfg.normalize_activations = "none"
        fresh.initialize_from_activations(first.sae_in)
        assert fresh.b_router.any()
        assert_close(first.after, fresh.state_dict(), atol=0)
        median = geometric_median(torch.cat([first.sae_in, second.sae_in]))
        assert_close(second.after["b_router"], median, atol=1e-6)
        before = second.before.state_dict()
        for name, value in second.after.items():
            assert torch.equal(value, before[name]) == ("router" not in name)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Records the steps of each architecture's SAE."""
    steps = Steps()
    plain = MixtureTrainingSAE.training_forward_pass

    def recording(sae: Any, step_input: TrainStepInput) -> TrainStepOutput:
        before = copy.deepcopy(sae)
        output = plain(sae, step_input)
        after = copy.deepcopy(sae.state_dict())
        step = Step(before, step_input.sae_in.clone(), after)
        steps.seen.setdefault(sae.cfg.architecture(), []).append(step)
        return output

    monkeypatch.setattr(MixtureTrainingSAE, "training_forward_pass", recording)
    return steps


@both_architectures
@pytest.mark.parametrize("norm", NORMS)
def test_the_runner_starts_a_fresh_SAE(
    architecture: str,
    norm: str,
    steps: Steps,
    tiny_model: HookedSAETransformer,
):
    sae = sae_config(architecture, normalize_activations=norm)
    make_runner(runner_config(sae, **TWO_STEPS), tiny_model).run()
    steps.assert_started(architecture)


@both_architectures
@pytest.mark.parametrize("option", ["resume_from_checkpoint", "from_pretrained_path"])
def test_the_runner_keeps_weights_that_it_loads(
    architecture: str,
    option: str,
    steps: Steps,
    tiny_model: HookedSAETransformer,
    tmp_path: Path,
):
    settings = {
        **TWO_STEPS,
        "training_tokens": 4 * 256,
        "checkpoint_path": str(tmp_path),
    }
    sae = sae_config(architecture)
    cfg = runner_config(sae, **settings, n_checkpoints=1)
    make_runner(cfg, tiny_model).run()
    steps.seen.clear()
    (checkpoint,) = Path(str(cfg.checkpoint_path)).iterdir()
    again: dict[str, Any] = {**settings, option: str(checkpoint)}
    make_runner(runner_config(copy.deepcopy(sae), **again), tiny_model).run()
    # The checkpoint was saved, and these steps are, among the first batches.
    for step in steps.seen[architecture]:
        assert step.before.b_router.any()
        assert_close(step.after, step.before.state_dict(), atol=0)


def test_the_runner_of_several_SAEs_starts_each(
    steps: Steps, tiny_model: HookedSAETransformer
):
    norm = {"normalize_activations": "expected_average_only_in"}
    cfg = MultiSAETrainingRunnerConfig(
        **TWO_STEPS,
        saes={name: sae_config(name, **norm) for name in ARCHITECTURES},
        hook_names=HOOK,
        logger=no_wandb(),
        output_path=None,
    )
    MultiSAETrainingRunner(
        cfg, override_dataset=small_corpus(), override_model=tiny_model
    ).run()
    for name in ARCHITECTURES:
        steps.assert_started(name)


@both_architectures
@pytest.mark.parametrize("norm", NORMS[:2])
def test_the_synthetic_data_runner_starts_a_fresh_SAE(
    architecture: str, norm: str, steps: Steps
):
    SyntheticSAERunner(
        SyntheticSAERunnerConfig(
            synthetic_model=SyntheticModelConfig(
                num_features=64, hidden_dim=32, seed=0
            ),
            sae=sae_config(architecture, normalize_activations=norm),
            training_samples=2 * 256,
            batch_size=256,
            n_batches_for_norm_estimate=4,
            eval_samples=256,
            logger=no_wandb(),
            checkpoint_path=None,
            output_path=None,
        )
    ).run()
    steps.assert_started(architecture)

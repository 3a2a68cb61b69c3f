"""Demands of SAELens's own tests on its architectures, in training."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    DEAD,
    X,
    assert_close,
    gradients,
    scale_sae,
    step_input,
    subclass,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from typing_extensions import override

from sae_lens_scale import ScaleTrainingSAE


def caching(sae: Any, method: Any, argument: Any) -> tuple[Any, dict[str, Any]]:
    """A method's result, and the tensors that passed the hooks meanwhile."""
    cache, forward, _ = sae.get_caching_hooks()
    with sae.hooks(fwd_hooks=forward):
        return method(argument), cache


def test_a_training_step_shows_its_hooks_what_a_forward_pass_does(
    make: Any, sparse: bool
):
    sae = make(
        use_sparse_activations=sparse,
        rescale_acts_by_decoder_norm=False,
    )
    step, seen = caching(sae, sae.training_forward_pass, step_input(X))
    out, want = sae.run_with_cache(X)
    # The forward pass ends with a hook that training has no use for.
    assert seen.keys() == want.keys() - {"hook_sae_output"}
    for name, value in seen.items():
        assert torch.equal(value, want[name])
    assert torch.equal(step.feature_acts, seen["hook_sae_acts_post"])
    assert torch.equal(step.hidden_pre, seen["hook_sae_acts_pre"])
    assert torch.equal(step.sae_out, out)


def test_a_training_step_returns_what_encode_with_hidden_pre_does(make: Any):
    before_the_gate: dict[str, Any] = {"topk_over": "activations"}
    dense = make(**before_the_gate, use_sparse_activations=False)
    step = dense.training_forward_pass(step_input(X))
    acts, hidden_pre = dense.encode_with_hidden_pre(X)
    assert torch.equal(step.feature_acts, acts)
    assert torch.equal(step.hidden_pre, hidden_pre)
    assert torch.equal(dense.encode(X), acts)
    candidates = 12 * dense.cfg.experts_per_token
    assert ((hidden_pre > -torch.inf).sum(-1) == candidates).all()
    sparse = make(**before_the_gate, use_sparse_activations=True)
    kept = sparse.training_forward_pass(step_input(X)).hidden_pre
    assert_close(kept.sort().values, hidden_pre.topk(6).values.sort().values)


def test_a_training_batch_may_have_more_dimensions(make: Any, sparse: bool):
    sae = make(use_sparse_activations=sparse)
    flat = sae.training_forward_pass(step_input(X, DEAD))
    folded = sae.training_forward_pass(step_input(X.view(2, 4, 10), DEAD))
    assert_close(folded.losses, flat.losses)
    assert_close(
        folded.feature_acts.to_dense(), flat.feature_acts.to_dense().view(2, 4, 60)
    )


class WithDecoderPenalty(ScaleTrainingSAE):
    @override
    def calculate_aux_loss(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        losses = super().calculate_aux_loss(*args, **kwargs)
        return {**losses, "decoder_penalty": 0.5 * self.W_dec.square().sum()}


def test_a_subclass_adds_its_own_loss():
    plain = scale_sae()
    sae = subclass(WithDecoderPenalty, plain)
    want = plain.training_forward_pass(step_input(X, DEAD))
    got = sae.training_forward_pass(step_input(X, DEAD))
    assert got.losses.keys() == want.losses.keys() | {"decoder_penalty"}
    assert_close(got.loss, want.loss + 0.5 * plain.W_dec.square().sum())
    difference = (
        gradients(sae, got.loss)["W_dec"] - gradients(plain, want.loss)["W_dec"]
    )
    assert_close(difference, plain.W_dec.detach())


def test_freezing_a_parameter_leaves_the_gradients_of_the_others_alone(
    make: Any, sparse: bool
):
    sae = make(use_sparse_activations=sparse, gate="softmax")

    def train() -> dict[str, torch.Tensor | None]:
        sae.zero_grad()
        sae.training_forward_pass(step_input(X, DEAD)).loss.backward()
        return {name: p.grad for name, p in sae.named_parameters()}

    want = train()
    assert all(gradient is not None for gradient in want.values())
    for frozen, parameter in sae.named_parameters():
        parameter.requires_grad_(False)
        got = train()
        parameter.requires_grad_(True)
        assert got.pop(frozen) is None
        assert_close(got, {name: want[name] for name in got})


def batches(seed: int = 0, scale: float = 3.0) -> Iterator[torch.Tensor]:
    """Sums of few directions out of 20, off centre: something that can be learned."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(20, 10, generator=torch.Generator().manual_seed(3))
    while True:
        chosen = torch.rand(32, 20, generator=generator) < 0.1
        yield scale * (chosen.float() @ directions) + 2.0


def fresh(make: Any, **overrides: Any) -> Any:
    torch.manual_seed(0)
    cfg = make(dtype="float32", **overrides).cfg
    return TrainingSAE.from_dict(cfg.to_dict())


def trainer(sae: Any, seed: int = 0, **settings: Any) -> SAETrainer[Any, Any]:
    defaults: dict[str, Any] = {
        "total_training_samples": 150 * 32,
        "train_batch_size_samples": 32,
        "lr": 3e-3,
        "lr_end": 3e-4,
        "n_batches_for_norm_estimate": 20,
        "dead_feature_window": 50,
    }
    return SAETrainer(SAETrainerConfig(**{**defaults, **settings}), sae, batches(seed))


def test_the_trainer_counts_what_fired(make: Any, sparse: bool):
    sae = fresh(make, use_sparse_activations=sparse)
    run = trainer(sae)
    fired = torch.zeros(2, 60)
    for step, batch in zip(range(2), batches(), strict=False):
        acts = run.step(batch).feature_acts
        assert acts.is_sparse == sparse
        fired[step] = (acts.to_dense() > 0).sum(0)
    assert torch.equal(run.act_freq_scores, fired.sum(0))
    assert run.n_frac_active_samples == 64
    waited = torch.where(fired[1] > 0, 0, torch.where(fired[0] > 0, 1, 2))
    assert torch.equal(run.n_forward_passes_since_fired, waited.float())


def test_the_trainer_logs_numbers(make: Any, sparse: bool):
    sae = fresh(make, use_sparse_activations=sparse)
    logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=1)
    run = trainer(sae, logger=logger)
    batch = next(batches())
    output = run.step(batch)
    logged = run.build_train_step_log_dict(output, n_training_samples=32)
    assert all(isinstance(value, (int, float)) for value in logged.values())
    assert logged["metrics/l0"] == pytest.approx(
        (output.feature_acts.to_dense() > 0).sum(-1).float().mean().item()
    )
    error = (batch - output.sae_out).square().sum() / (
        batch - batch.mean(0)
    ).square().sum()
    assert logged["metrics/explained_variance"] == pytest.approx(1 - error.item())
    losses = {name: value for name, value in logged.items() if "losses/" in name}
    total = losses.pop("losses/overall_loss")
    assert total == pytest.approx(sum(losses.values()))
    assert {"losses/mse_loss", "losses/load_balance_loss"} < losses.keys()
    assert logged["metrics/router/max_load"] >= 1


@pytest.mark.parametrize(
    "norm", ["none", "expected_average_only_in", "covariance_whitening"]
)
def test_the_trainer_folds_what_it_estimated(make: Any, norm: str, tmp_path: Path):
    sae = fresh(make, normalize_activations=norm)
    run = trainer(sae, save_final_checkpoint=True, checkpoint_path=str(tmp_path))
    run.fit()
    assert sae.cfg.normalize_activations == "none"
    assert run.activation_scaler.scaling_factor is None
    assert run.activation_scaler.whitening is None
    x = next(batches(seed=1))
    error = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert error < 0.5
    (checkpoint,) = tmp_path.iterdir()
    loaded = SAE.load_from_disk(checkpoint)
    assert_close(loaded(x), sae(x), atol=1e-4)
    metadata = loaded.cfg.metadata
    # SAELens sums float32 frequencies: k latents come to k up to rounding.
    assert metadata.l0 is not None
    assert 0 < metadata.l0 <= 6 + 1e-5
    assert metadata.num_dead_features == run.dead_neurons.sum()


@pytest.mark.parametrize("norm", ["expected_average_only_in", "covariance_whitening"])
def test_a_resumed_trainer_folds_the_statistics_of_its_checkpoint(
    make: Any, norm: str, tmp_path: Path
):
    sae = fresh(make, normalize_activations=norm)
    first = trainer(sae, total_training_samples=32)
    scaler = first.activation_scaler
    estimate = {
        "expected_average_only_in": scaler.estimate_scaling_factor,
        "covariance_whitening": scaler.estimate_whitening,
    }[norm]
    estimate(10, batches(), 20)
    first.n_training_samples = 32
    first.save_trainer_state(tmp_path)
    want = copy.deepcopy(sae)
    if scaler.whitening is None:
        want.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    else:
        want.fold_activation_whitening(
            scaler.whitening.mean,
            scaler.whitening.matrix,
            scaler.whitening.inverse_matrix,
        )
    # Nothing is left to train, and other data would give other statistics.
    second = trainer(sae, seed=7, total_training_samples=32)
    second.load_trainer_state(tmp_path)
    second.fit()
    assert (sae.W_router - fresh(make).W_router).abs().max() > 0.01
    assert_close(sae.state_dict(), want.state_dict(), atol=0)


def test_training_records_l0_and_the_latents_that_died(make: Any):
    sae = fresh(make, k=3)
    sae.b_enc.data += 100  # more candidates are positive than TopK keeps
    sae.b_enc.data[::7] = -1e6
    run = trainer(sae, total_training_samples=20 * 32, dead_feature_window=15)
    run.fit()
    assert sae.cfg.metadata.l0 == pytest.approx(3)
    assert run.dead_neurons[::7].all()
    assert sae.cfg.metadata.num_dead_features == run.dead_neurons.sum() < 60

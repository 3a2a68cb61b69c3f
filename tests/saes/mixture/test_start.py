"""Start of a fresh SAE from its first training batch, and the pace of its router."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DEAD, assert_close, draw, exported, scale_sae, step_input
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAE, TrainingSAE, TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from torch import nn
from typing_extensions import override

from sae_lens_scale import ScaleTrainingSAE
from sae_lens_scale.runner import apply_lr_factors
from sae_lens_scale.saes.mixture.initialization import geometric_median

# Off centre, so that biases have somewhere to go.
X = draw(40, 10, seed=1).float() + 2


def fresh(make: Any = scale_sae, **overrides: Any) -> Any:
    """An SAE in float32 as a runner makes it, that starts from its first batch."""
    settings = {"dtype": "float32", "initialize_from_activations": True, **overrides}
    cfg = make(**settings).cfg
    torch.manual_seed(0)
    return TrainingSAE.from_dict(cfg.to_dict())


def step(sae: Any, x: torch.Tensor = X) -> Any:
    return sae.training_forward_pass(step_input(x, DEAD))


def state(sae: Any) -> dict[str, torch.Tensor]:
    return copy.deepcopy(sae.state_dict())


def started(sae: Any, x: torch.Tensor = X) -> dict[str, torch.Tensor]:
    """Weights after ``initialize_from_activations``, of a copy."""
    sae = copy.deepcopy(sae)
    sae.initialize_from_activations(x)
    assert sae.b_router.all()
    return state(sae)


NO_AUX = {"aux_loss_coefficient": 0.0}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"dtype": "float64"},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"normalize_activations": "layer_norm", **NO_AUX},
        {"normalize_activations": "constant_norm_rescale", **NO_AUX},
        {"use_sparse_activations": False, "apply_b_dec_to_input": False},
        {"router_lr_factor": 0.3, "multi_topk_coefficient": 0.1},
    ],
    ids=str,
)
def test_a_fresh_SAE_starts_from_its_first_batch_and_from_no_other(
    make: Any, overrides: dict[str, Any]
):
    sae = fresh(make, **overrides)
    x = X.to(sae.dtype)
    want = started(sae, x)
    step(sae, x)
    assert_close(sae.state_dict(), want, atol=0)
    step(sae, x + 1)
    assert_close(sae.state_dict(), want, atol=0)


def test_shared_experts_have_no_part_in_the_start():
    sae = fresh(experts_per_token=3, num_shared_experts=2)
    want = started(sae)
    step(sae)
    assert_close(sae.state_dict(), want, atol=0)
    assert not sae.W_router[:, :2].any()


@pytest.mark.parametrize("norm", ["expected_average_only_in", "covariance_whitening"])
def test_the_start_is_in_the_units_of_the_trainer(make: Any, norm: str):
    sae = fresh(make, normalize_activations=norm)
    cfg = SAETrainerConfig(
        total_training_samples=40, train_batch_size_samples=40, lr=0.0, lr_end=0.0
    )
    trainer: Any = SAETrainer(cfg, sae, iter([]))
    scaler = trainer.activation_scaler
    if norm == "covariance_whitening":
        scaler.estimate_whitening(10, iter([X * 30, X * 20]), 2)
    else:
        scaler.estimate_scaling_factor(10, iter([X * 30, X * 20]), 2)
    twin = fresh(make)
    want = started(twin, scaler(30 * X))
    trainer.step(30 * X)
    assert_close(sae.state_dict(), want, atol=0)


def test_heads_are_joined_before_the_start(make: Any):
    sae = fresh(make, **NO_AUX)
    want = started(sae)
    sae.turn_on_forward_pass_hook_z_reshaping()
    step(sae, X.view(40, 2, 5))
    assert_close(sae.state_dict(), want, atol=0)


def test_the_start_is_the_same_under_autocast(make: Any):
    sae = fresh(make)
    want = started(sae)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(sae)
    assert_close(sae.state_dict(), want, atol=0)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda sae: sae.to(torch.float64),
        lambda sae: sae.to("cpu", torch.bfloat16),
    ],
    ids=["deepcopy", "float64", "bfloat16"],
)
def test_a_copy_of_a_fresh_SAE_starts_too(make: Any, copied: Callable[[Any], Any]):
    sae = copied(fresh(make))
    want = started(sae, X.to(sae.dtype))
    step(sae, X.to(sae.dtype))
    assert_close(sae.state_dict(), want, atol=0)


def test_the_start_draws_nothing_from_torch_and_depends_on_its_seed_only(make: Any):
    sae, twin, other = fresh(make), fresh(make), fresh(make)
    torch.manual_seed(7)
    random = torch.get_rng_state()
    step(sae)
    assert torch.equal(torch.get_rng_state(), random)
    torch.rand(3)
    step(twin)
    assert_close(twin.state_dict(), state(sae), atol=0)
    torch.manual_seed(8)
    step(other)
    assert not torch.equal(other.W_router, sae.W_router)


def set_router(sae: Any, folder: Path) -> Any:
    sae.W_router.data = torch.zeros(10, 5)
    return sae


def set_router_centre(sae: Any, folder: Path) -> Any:
    sae.b_router.data[3] = 1
    return sae


def initialized(sae: Any, folder: Path) -> Any:
    sae.initialize_from_activations(X + 1)
    return sae


def switched_off(sae: Any, folder: Path) -> Any:
    sae.cfg.initialize_from_activations = False
    return sae


def loaded_from_disk(sae: Any, folder: Path) -> Any:
    sae.save_model(folder)
    return TrainingSAE.load_from_disk(folder)


def loaded_from_an_export(sae: Any, folder: Path) -> Any:
    sae.save_inference_model(folder)
    return TrainingSAE.load_from_disk(folder)


def loaded_from_a_checkpoint(sae: Any, folder: Path) -> Any:
    sae.save_model(folder)
    sae.load_weights_from_checkpoint(folder)
    return sae


@pytest.mark.parametrize(
    "change",
    [
        set_router,
        set_router_centre,
        initialized,
        switched_off,
        loaded_from_disk,
        loaded_from_an_export,
        loaded_from_a_checkpoint,
    ],
)
def test_weights_that_were_set_or_loaded_stay(
    make: Any, change: Callable[[Any, Path], Any], tmp_path: Path
):
    sae = change(fresh(make), tmp_path)
    before = state(sae)
    step(sae)
    assert_close(sae.state_dict(), before, atol=0)


def test_weights_of_load_state_dict_stay_though_they_equal_those_of_the_start(
    make: Any,
):
    sae = fresh(make)
    before = state(sae)
    sae.load_state_dict(before)
    step(sae)
    assert_close(sae.state_dict(), before, atol=0)


def test_a_field_that_is_off_keeps_random_weights(make: Any):
    sae = fresh(make, initialize_from_activations=False)
    before = state(sae)
    step(sae)
    assert_close(sae.state_dict(), before, atol=0)


def test_the_rest_that_was_set_by_hand_stays_when_the_router_starts(make: Any):
    sae = fresh(make)
    sae.b_dec.data.fill_(1)
    sae.b_enc.data.fill_(2)
    sae.W_enc.data *= 3
    want = state(sae) | {name: started(sae)[name] for name in ("W_router", "b_router")}
    step(sae)
    assert_close(sae.state_dict(), want, atol=0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (X.where(X < 2, torch.nan), "batch must be finite"),
        (X.where(X < 2, torch.inf), "batch must be finite"),
        (X[:, :5], "must be d_in=10"),
        (X[:0], "the batch is empty"),
    ],
    ids=["nan", "inf", "width", "empty"],
)
def test_a_bad_first_batch_is_refused_and_the_next_one_is_the_first(
    make: Any, bad: torch.Tensor, message: str
):
    sae = fresh(make)
    before, want = state(sae), started(sae)
    with pytest.raises(ValueError, match=message):
        step(sae, bad)
    assert_close(sae.state_dict(), before, atol=0)
    step(sae)
    assert_close(sae.state_dict(), want, atol=0)


def test_fewer_tokens_than_experts_leave_every_expert_within_reach(make: Any):
    sae = fresh(make)
    with pytest.warns(UserWarning, match="holds 3 tokens: 2 of the experts start from"):
        step(sae, X[:3])
    assert all(p.isfinite().all() for p in sae.parameters())
    W_router, b_router = sae.applied_router()
    assert sae.route(b_router + W_router.T).indices[:, 0].tolist() == list(range(5))


@pytest.mark.filterwarnings("ignore:the first training batch")
@pytest.mark.parametrize("tokens", [1, 40])
def test_equal_tokens_give_a_router_that_can_be_trained(make: Any, tokens: int):
    sae = fresh(make)
    step(sae, X[:1].repeat(tokens, 1))
    gates = sae.route(X).probabilities
    assert gates.isfinite().all()
    loss = step(sae).loss
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in sae.parameters())


class Elsewhere(ScaleTrainingSAE):
    """A transcoder to activations of the same width."""

    @override
    def target(self, step_input: TrainStepInput) -> torch.Tensor:
        return step_input.sae_in.flip(-1)


class Narrower(ScaleTrainingSAE):
    """A transcoder to activations of width 4."""

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_dec = nn.Parameter(torch.randn(60, 4))
        self.b_dec = nn.Parameter(torch.zeros(4))

    @override
    def target(self, step_input: TrainStepInput) -> torch.Tensor:
        return step_input.sae_in[..., :4]


@pytest.mark.parametrize("cls", [Elsewhere, Narrower])
def test_a_transcoder_starts_its_router_alone(cls: type[ScaleTrainingSAE]):
    cfg = fresh(apply_b_dec_to_input=False).cfg
    by_itself, by_hand = cls(cfg), cls(cfg)
    for sae in (by_itself, by_hand):
        before = state(sae)
        if sae is by_hand:
            sae.initialize_from_activations(X)
        step(sae)
        W_router, b_router = sae.applied_router()
        assert_close(b_router, geometric_median(X), atol=0)
        assert ((X - b_router) @ W_router).std().item() == pytest.approx(1, abs=1e-3)
        assert sae.W_router.norm() != before["W_router"].norm()
        rest = {n: t for n, t in state(sae).items() if "router" not in n}
        assert_close(rest, {name: before[name] for name in rest}, atol=0)


def adam_steps(sae: Any, steps: int, **lr_factors: float) -> None:
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    if lr_factors:
        apply_lr_factors(optimizer, sae, lr_factors)
    for i in range(steps):
        step(sae, draw(40, 10, seed=i).to(sae.dtype)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_step_of_Adam_changes_the_router_by_the_factor(make: Any):
    sae = make(router_lr_factor=0.25, gate="softmax")
    before = state(sae)
    adam_steps(sae, 1)
    for name, share in (("W_router", 0.25), ("b_router", 0.25), ("b_dec", 1.0)):
        change = (sae.state_dict()[name] - before[name]).abs()
        assert_close(change, torch.full_like(change, share * 1e-3), atol=1e-6)


@pytest.mark.parametrize("factor", [1 / 8, 0.3])
def test_the_factor_is_a_learning_rate(make: Any, factor: float):
    sae, other = make(router_lr_factor=factor), make(router_lr_factor=1.0)
    other.load_state_dict(sae.state_dict())
    before = state(sae)
    adam_steps(sae, 10)
    adam_steps(other, 10, W_router=factor, b_router=factor)
    assert_close(sae.state_dict(), other.state_dict(), atol=1e-6)
    assert (sae.state_dict()["W_router"] - before["W_router"]).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_goes_on_from_files_as_without_them(
    make: Any, dtype: str, tmp_path: Path
):
    sae = fresh(make, dtype=dtype)
    adam_steps(sae, 3)
    sae.save_model(tmp_path)
    again: Any = TrainingSAE.load_from_disk(tmp_path)
    assert_close(dict(again.named_parameters()), dict(sae.named_parameters()), atol=0)
    adam_steps(sae, 3)
    adam_steps(again, 3)
    assert_close(again.state_dict(), sae.state_dict(), atol=0)


@pytest.mark.parametrize("factor", [0.3, 5.0])
def test_any_factor_leaves_exports_and_folds_as_they_are(
    make: Any, factor: float, tmp_path: Path
):
    sae, x = make(router_lr_factor=factor), X.double()
    plain = make(router_lr_factor=1.0)
    plain.load_state_dict(sae.state_dict())
    assert_close(sae.encode(x), plain.encode(x))
    assert_close(exported(sae, tmp_path).encode(x), plain.encode(x))
    for both in (sae, plain):
        both.fold_activation_norm_scaling_factor(2.5)
    assert_close(sae.encode(x), plain.encode(x))
    whitening = draw(10, 10, seed=6)
    for both in (sae, plain):
        both.fold_activation_whitening(x[0], whitening, whitening.inverse())
    assert_close(sae.encode(x), plain.encode(x))


def test_a_later_change_of_the_factor_leaves_the_router_as_it_is(make: Any):
    sae, x = make(), X.double()
    acts = sae.encode(x)
    sae.cfg.router_lr_factor = 1.0
    assert torch.equal(sae.encode(x), acts)


def test_state_dicts_hold_the_applied_router_and_share_nothing_with_it(make: Any):
    sae = make()
    for name, applied in zip(
        ("W_router", "b_router"), sae.applied_router(), strict=True
    ):
        held = sae.state_dict()[name]
        assert_close(held, applied.data, atol=0)
        held.zero_()
        assert getattr(sae, name).all()


def test_a_router_too_large_for_float16_is_refused(make: Any, tmp_path: Path):
    sae = fresh(make, router_lr_factor=1 / 64)
    sae.b_router.data[0] = 64 * 2000
    sae.save_model(tmp_path)
    with pytest.raises(
        ValueError, match=r"float16 is too small.*router_lr_factor=0\.0"
    ):
        TrainingSAE.load_from_disk(tmp_path, dtype="float16")
    # For inference nothing is divided.
    for_inference = SAE.load_from_disk(tmp_path, dtype="float16")
    assert for_inference.b_router[0] == 2000  # type: ignore[index]

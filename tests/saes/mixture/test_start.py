"""Start of a fresh SAE from its first training batches."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEAD, assert_close, draw, scale_sae, step_input
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from torch import nn
from typing_extensions import override

from sae_lens_scale import ScaleTrainingSAE
from sae_lens_scale.saes.mixture.initialization import (
    geometric_median,
    spherical_kmeans,
)

# Off centre, so that biases have somewhere to go.
X = draw(40, 10, seed=1).float() + 2
# A start takes 12,800 tokens at least: four of these are too few.
BATCHES = (draw(15_000, 10, seed=3).float() + 2).split(3_000)


def fresh(make: Any = scale_sae, **overrides: Any) -> Any:
    """An SAE in float32 as a runner makes it, that starts from its first batches."""
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


def later_router(
    earlier: dict[str, torch.Tensor], x: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The router of a small SAE after clustering that goes on from an earlier router."""
    median = geometric_median(x)
    columns = earlier["W_router"].T.to(x.dtype)
    centers = spherical_kmeans(x - median, 5, centers=F.normalize(columns, dim=-1))
    spread = ((x - median) @ centers.T).std(correction=1)
    return {"W_router": centers.T / spread, "b_router": median}


def assert_routes_as(sae: Any, want: dict[str, torch.Tensor]) -> None:
    tolerance = 8 * torch.finfo(sae.dtype).eps if sae.dtype.itemsize < 4 else 1e-5
    for name, value in want.items():
        got = sae.state_dict()[name].to(value.dtype)
        torch.testing.assert_close(got, value, atol=tolerance, rtol=tolerance)


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
def test_the_router_starts_with_1_2_4_batches_and_when_they_suffice(
    make: Any, overrides: dict[str, Any]
):
    sae = fresh(make, **overrides)
    batches = [batch.to(sae.dtype) for batch in BATCHES]
    want = started(sae, batches[0])
    step(sae, batches[0])
    assert_close(sae.state_dict(), want, atol=0)
    for seen in range(2, 6):
        before = state(sae)
        step(sae, batches[seen - 1])
        if seen == 3:
            assert_close(sae.state_dict(), before, atol=0)
        else:
            x = torch.cat([sae._inputs(batch).x.float() for batch in batches[:seen]])
            assert_routes_as(sae, later_router(before, x))
            # Their median is the router's alone.
            rest = {n: t for n, t in state(sae).items() if "router" not in n}
            assert_close(rest, {name: want[name] for name in rest}, atol=0)
    want = state(sae)
    for _ in range(3):
        step(sae, batches[0] + 1)
    assert_close(sae.state_dict(), want, atol=0)


def test_later_batches_leave_tokens_with_their_experts(make: Any):
    directions = 5 * F.normalize(draw(5, 10).float(), dim=-1)
    sae = fresh(make)
    for seen, noise in enumerate(BATCHES[:4]):
        step(sae, directions.repeat(600, 1) + noise / 10)
        experts = sae.route(directions).indices[:, 0]
        first = experts if seen == 0 else first
        assert torch.equal(experts, first)
    assert len(set(first.tolist())) == 5


def test_batches_are_kept_until_the_start_is_over_and_no_longer(make: Any):
    sae = fresh(make)
    for batch in BATCHES:
        assert sae._is_starting
        step(sae, batch)
    assert not sae._is_starting
    assert not sae._first_batches


def test_each_routed_expert_gets_50_tokens():
    x = draw(14_900, 10).float()
    few = fresh()
    many = fresh(d_sae=1_800, num_experts=300, num_shared_experts=1)
    for sae in (few, many):
        sae.training_forward_pass(step_input(x))
    assert not few._is_starting
    assert many._is_starting
    many.training_forward_pass(step_input(x[:50]))
    assert not many._is_starting


@pytest.mark.parametrize("tokens_before", [0, 3_000])
def test_a_start_takes_65536_tokens_at_most(tokens_before: int):
    x = draw(70_000, 10).float()
    sae, other = fresh(), fresh()
    for same in (sae, other):
        if tokens_before:
            step(same, x[:tokens_before])
    step(sae, x[tokens_before:])
    step(other, x[tokens_before:65_536])
    assert_close(sae.state_dict(), state(other), atol=0)
    assert not sae._is_starting


def test_a_batch_may_be_overwritten_after_its_step(make: Any):
    sae, other = fresh(make), fresh(make)
    x = BATCHES[0].clone()
    step(sae, x)
    x.zero_()
    step(sae, BATCHES[1])
    for batch in BATCHES[:2]:
        step(other, batch)
    assert_close(sae.state_dict(), state(other), atol=0)


def test_a_start_changes_the_router_alone_once_training_has_begun(make: Any):
    factor = 1 / 4
    sae = fresh(make, gate="softmax", router_lr_factor=factor)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    step(sae, BATCHES[0]).loss.backward()
    for seen, batch in enumerate(BATCHES[1:], start=2):
        optimizer.step()
        optimizer.zero_grad()
        before = state(sae)
        loss = step(sae, batch).loss
        after = state(sae)
        for name, value in before.items():
            restarts = "router" in name and seen != 3
            assert torch.equal(after[name], value) != restarts, (seen, name)
        loss.backward()
    optimizer.step()
    # Of Adam's usual size, 3.2 lr at most, though the router has leapt before.
    for name, lr in {"W_router": factor * 1e-3, "b_dec": 1e-3}.items():
        change = (sae.state_dict()[name] - after[name]).abs().max()
        assert 0.1 * lr < change < 3.2 * lr


def test_a_step_is_compiled_once_for_all_first_batches():
    sae = fresh(**NO_AUX)
    # To compile it takes long, and it knows nothing of the start.
    sae._encode = torch.compiler.disable(sae._encode)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(sae.training_forward_pass, backend="eager")
    frames = []
    for i in range(10):
        compiled(step_input(X + i))
        frames.append(counters["frames"]["ok"])
    # The second step may find out what all have in common.
    assert 0 < frames[1] == frames[-1]
    assert len(sae._first_batches) == 10


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
@pytest.mark.parametrize("batches_before", [0, 1])
def test_a_copy_starts_as_the_SAE_would(
    make: Any, copied: Callable[[Any], Any], batches_before: int
):
    sae = fresh(make)
    for batch in BATCHES[:batches_before]:
        step(sae, batch)
    sae = copied(sae)
    before, x = state(sae), BATCHES[batches_before].to(sae.dtype)
    want = later_router(before, torch.cat([*BATCHES[:batches_before], x.float()]))
    if not batches_before:
        want = started(sae, x)
    step(sae, x)
    assert_routes_as(sae, want)


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


def folded(sae: Any, folder: Path) -> Any:
    sae.fold_activation_norm_scaling_factor(2.5)
    return sae


def state_dict_loaded(sae: Any, folder: Path) -> Any:
    # Equal to those of the start.
    sae.load_state_dict(state(sae))
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


CHANGES = [
    initialized,
    switched_off,
    folded,
    state_dict_loaded,
    loaded_from_disk,
    loaded_from_an_export,
    loaded_from_a_checkpoint,
]


@pytest.mark.parametrize("change", [set_router, set_router_centre, *CHANGES])
def test_a_start_does_not_begin_with_weights_that_were_set_or_loaded(
    make: Any, change: Callable[[Any, Path], Any], tmp_path: Path
):
    sae = change(fresh(make), tmp_path)
    before = state(sae)
    step(sae)
    assert_close(sae.state_dict(), before, atol=0)


@pytest.mark.parametrize("change", CHANGES)
def test_a_start_does_not_go_on_with_weights_that_were_set_or_loaded(
    make: Any, change: Callable[[Any, Path], Any], tmp_path: Path
):
    sae = fresh(make)
    step(sae)
    sae = change(sae, tmp_path)
    before = state(sae)
    step(sae, X + 1)
    assert_close(sae.state_dict(), before, atol=0)
    assert not sae._first_batches


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
@pytest.mark.parametrize("batches_before", [0, 1])
def test_a_bad_batch_is_refused_and_the_start_goes_on_with_the_next_one(
    make: Any, bad: torch.Tensor, message: str, batches_before: int
):
    sae = fresh(make)
    twin = copy.deepcopy(sae)
    good = [X + i for i in range(batches_before + 1)]
    for batch in good[:-1]:
        step(sae, batch)
    before = state(sae)
    with pytest.raises(ValueError, match=message):
        step(sae, bad)
    assert_close(sae.state_dict(), before, atol=0)
    step(sae, good[-1])
    for batch in good:
        step(twin, batch)
    assert_close(sae.state_dict(), state(twin), atol=0)


def test_fewer_tokens_than_experts_leave_every_expert_within_reach(make: Any):
    sae = fresh(make)
    step(sae, X[:3])
    assert all(p.isfinite().all() for p in sae.parameters())
    W_router, b_router = sae.applied_router()
    assert sae.route(b_router + W_router.T).indices[:, 0].tolist() == list(range(5))
    step(sae, X[3:])
    assert sae.route(X).indices[:, 0].unique().tolist() == list(range(5))


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


def test_an_average_follows_the_SAE_through_its_start(make: Any):
    sae = fresh(make)
    average = torch.optim.swa_utils.AveragedModel(sae)
    for batch in BATCHES:
        assert sae._is_starting
        step(sae, batch)
        average.update_parameters(sae)
    assert not sae._is_starting
    assert average(X).isfinite().all()
    copy.deepcopy(average).load_state_dict(average.state_dict())


def test_a_loss_without_gradients_takes_no_part_in_the_start(make: Any):
    sae = fresh(make)
    before = state(sae)
    with torch.no_grad():
        step(sae, X + 5)
    assert_close(sae.state_dict(), before, atol=0)
    want = started(sae)
    step(sae)
    with torch.no_grad():
        step(sae, X + 5)
    assert_close(sae.state_dict(), want, atol=0)
    assert len(sae._first_batches) == 1

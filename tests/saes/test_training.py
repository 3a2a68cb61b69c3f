"""Training: steps, precisions, diagnostics, initialisation from activations."""

import copy
from typing import Any

import pytest
import torch
from helpers import assert_close, scale_sae, step_input, switch_sae
from helpers import draw as draw_float64
from sae_lens.saes.sae import TrainingSAE

from sae_lens_scale import ScaleTrainingSAE, ScaleTrainingSAEConfig
from sae_lens_scale.saes.mixture.initialization import geometric_median


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return draw_float64(*shape, seed=seed).float()


def fresh(make: Any = scale_sae, **overrides: Any) -> Any:
    """An SAE in float32 as training starts with it: 8 experts of 16 latents, k 4."""
    settings = {"d_in": 16, "d_sae": 128, "num_experts": 8, "k": 4, "dtype": "float32"}
    cfg = make(**{**settings, **overrides}).cfg
    torch.manual_seed(0)
    return TrainingSAE.from_dict(cfg.to_dict())


def train(sae: Any, x: torch.Tensor, steps: int, autocast: bool = False) -> list[float]:
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    dead = torch.arange(sae.cfg.d_sae) % 3 == 0
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = sae.training_forward_pass(step_input(x.to(sae.dtype), dead))
        output.loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in sae.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.losses["mse_loss"].item())
    return losses


@pytest.mark.parametrize(
    ("dtype", "autocast"), [("float32", False), ("bfloat16", False), ("float32", True)]
)
def test_training_steps_lower_the_loss_in_every_precision(
    make: Any, dtype: str, autocast: bool
):
    losses = train(fresh(make, dtype=dtype), draw(200, 16), 60, autocast)
    assert losses[-1] < 0.8 * losses[0]


def test_deepcopy_and_change_of_dtype_keep_the_function(make: Any):
    sae, x = make(dtype="float32"), draw(9, 10, seed=1)
    twin = copy.deepcopy(sae)
    assert torch.equal(twin.encode(x), sae.encode(x))
    with torch.no_grad():
        twin.W_enc.zero_()
    assert (sae.W_enc != 0).any()
    double = copy.deepcopy(sae).to(torch.float64)
    torch.testing.assert_close(double(x).float(), sae(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_with_non_finite_values_stops_training(make: Any, bad: float):
    x = draw(20, 10)
    x[3, 5] = bad
    with pytest.raises(ValueError, match="loss is not finite .*NaN or infinite"):
        make().training_forward_pass(step_input(x))


def test_a_router_gone_wrong_stops_training_though_reconstruction_is_finite():
    sae = fresh(gate="uniform")
    sae.W_router.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="load_balance_loss nan"):
        sae.training_forward_pass(step_input(draw(20, 16)))


def test_parameters_and_their_order_are_frozen():
    # Resuming restores the optimiser's state by position.
    names = ["b_dec", "W_dec", "W_enc", "b_enc", "W_router", "b_router"]
    for sae, more in (
        (scale_sae(decomposition="learned"), ["omega", "W_low_pass"]),
        (scale_sae(), ["omega"]),
        (scale_sae(feature_scaling=False), []),
        (switch_sae(), []),
    ):
        assert [name for name, _ in sae.named_parameters()] == names + more


def test_diagnostics_come_on_logging_steps_only():
    sae = fresh()
    # Three experts of 16 latents are dead, and a part of the fourth.
    x, dead = draw(50, 16), torch.arange(128) < 3 * 16 + 5
    assert sae.training_forward_pass(step_input(x, dead)).metrics == {}
    histograms = {"weights/W_dec_norms", "weights/W_router_norms", "weights/omega"}
    assert set(sae.log_histograms()) == histograms
    sae.omega.data.copy_(torch.arange(8.0))
    metrics = sae.training_forward_pass(
        step_input(x, dead, is_logging_step=True)
    ).metrics
    load = torch.bincount(sae.route(x).indices.flatten(), minlength=8) / 100
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {
            "router/max_load": 8 * load.max().item(),
            "router/load_entropy": torch.special.entr(load).sum().item(),
            "router/idle_experts": (load == 0).sum().item(),
            "router/dead_experts": 3,
            "omega/mean": 3.5,
            "omega/min": 0,
            "omega/max": 7,
        }
    )
    assert set(sae.log_histograms()) == histograms | {"router/load"}
    assert sae.log_histograms()["router/load"].tolist() == pytest.approx(load.tolist())


def test_logged_router_metrics_are_of_the_routed_experts():
    sae = scale_sae(experts_per_token=3, num_shared_experts=2)
    output = sae.training_forward_pass(step_input(draw(50, 10), is_logging_step=True))
    load = torch.bincount(sae.route(draw(50, 10)).indices[:, 2] - 2, minlength=3) / 50
    assert output.metrics["router/max_load"] == pytest.approx(3 * load.max().item())


LOSSES = {
    "load_balance_coefficient": "load_balance_loss",
    "aux_loss_coefficient": "auxiliary_reconstruction_loss",
    "multi_topk_coefficient": "multi_topk_loss",
}


@pytest.mark.parametrize("off", LOSSES)
def test_a_coefficient_of_zero_turns_its_loss_off(off: str):
    coefficients: dict[str, Any] = {"multi_topk_coefficient": 0.1, off: 0.0}
    sae = scale_sae(**coefficients)
    dead = torch.ones(60, dtype=torch.bool)
    losses = sae.training_forward_pass(step_input(draw(50, 10), dead)).losses
    assert set(losses) == {"mse_loss", *LOSSES.values()} - {LOSSES[off]}


def test_initialize_from_activations_centres_biases_and_spreads_the_router(make: Any):
    sae = fresh(make)
    directions = torch.nn.functional.normalize(draw(8, 16), dim=-1)
    x = 4 * directions[torch.arange(800) % 8] + 0.1 * draw(800, 16, seed=1) + 5.0
    sae.initialize_from_activations(x.view(8, 100, 16))
    W_router, median = sae.applied_router()
    torch.testing.assert_close(median.data, geometric_median(x))
    assert torch.equal(sae.b_dec, median)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    logits = (x - median) @ W_router
    assert logits.std().item() == pytest.approx(1.0, abs=1e-3)
    # Tokens of one cluster share their first expert.
    first = sae.route(x).indices[:, 0].view(100, 8)
    assert (first == first[0]).float().mean() > 0.95


def test_initialize_from_activations_leaves_shared_experts_out_of_the_clusters():
    sae = scale_sae(experts_per_token=3, num_shared_experts=2)
    sae.initialize_from_activations(draw(500, 10))
    assert (sae.W_router[:, :2] == 0).all()
    assert (sae.W_router[:, 2:].norm(dim=0) > 0).all()


def test_initialize_from_activations_normalises_as_training_will():
    x = draw(500, 16) * 30 + 100
    sae = fresh(normalize_activations="expected_average_only_in")
    sae.initialize_from_activations(x)
    factor = 4.0 / x.norm(dim=-1).mean()
    torch.testing.assert_close(sae.b_dec.data, geometric_median(x * factor))
    sae = fresh(normalize_activations="layer_norm", aux_loss_coefficient=0.0)
    sae.initialize_from_activations(x)
    centred = x - x.mean(-1, keepdim=True)
    want = geometric_median(centred / (centred.std(-1, keepdim=True) + 1e-5))
    torch.testing.assert_close(sae.b_dec.data, want)
    assert not vars(sae).keys() & {"ln_mu", "ln_std"}, "activations stayed on the SAE"


ONES_AND_ZEROS = torch.ones(20, 10)
ONES_AND_ZEROS[7] = 0


@pytest.mark.parametrize(
    ("batch", "norm", "message"),
    [
        (torch.zeros(20, 9), "none", r"dimension of batch must be d_in=10.*\(20, 9\)"),
        (torch.zeros(4, 10), "none", "at least num_experts=5 tokens, got 4"),
        (torch.full((20, 10), float("nan")), "none", "batch must be finite"),
        *(
            (torch.full((20, 10), value), norm, "batch must be finite, in norms")
            for value in (1e25, 3e38, -3e38)
            for norm in ("none", "expected_average_only_in")
        ),
        *(
            (torch.full((20, 10), value), "expected_average_only_in", "zero everywhere")
            # The norm of the second is 0 in float32.
            for value in (0.0, 1e-30)
        ),
        (ONES_AND_ZEROS, "constant_norm_rescale", "once normalised"),
        (draw(20, 10), "covariance_whitening", "covariance_whitening"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_initialize_from_activations_refuses_bad_batches_and_changes_nothing(
    make: Any, batch: torch.Tensor, norm: str, message: str
):
    sae = make(normalize_activations=norm, aux_loss_coefficient=0)
    before = copy.deepcopy(sae.state_dict())
    with pytest.raises(ValueError, match=message):
        sae.initialize_from_activations(batch)
    assert_close(sae.state_dict(), before, atol=0)


@pytest.mark.parametrize("router_lr_factor", [1 / 8, 4.0])
def test_activations_that_float16_does_not_hold_are_refused_and_change_nothing(
    make: Any, router_lr_factor: float
):
    sae = make(dtype="float16", router_lr_factor=router_lr_factor)
    before = copy.deepcopy(sae.state_dict())
    with pytest.raises(ValueError, match="batch must be finite, .* in the SAE's dtype"):
        sae.initialize_from_activations(1e5 + draw(20, 10))
    assert_close(sae.state_dict(), before, atol=0)
    sae.initialize_from_activations(1e3 + draw(20, 10))
    assert all(parameter.isfinite().all() for parameter in sae.parameters())


@pytest.mark.parametrize(
    ("batch", "num_experts"),
    [
        pytest.param(torch.zeros(20, 10), 5, id="zeros"),
        pytest.param(torch.full((20, 10), 3), 5, id="equal integers"),
        pytest.param(torch.full((20, 10), 1e-30), 5, id="tiny"),
        pytest.param(torch.eye(10)[:5], 5, id="a token per expert"),
        pytest.param(torch.ones(1, 10), 1, id="a single token"),
    ],
)
def test_activations_without_spread_give_finite_weights(
    batch: torch.Tensor, num_experts: int
):
    sae = switch_sae(num_experts=num_experts)
    sae.initialize_from_activations(batch)
    assert all(parameter.isfinite().all() for parameter in sae.parameters())


def test_initialize_from_activations_beats_the_random_start(make: Any):
    directions = torch.nn.functional.normalize(draw(64, 16), dim=-1)
    choice = torch.randint(64, (2000, 3), generator=torch.Generator().manual_seed(2))
    x = directions[choice].sum(1) * 3 + 2.0
    random, started = fresh(make), fresh(make)
    started.initialize_from_activations(x)
    assert train(started, x, 40)[-1] < train(random, x, 40)[-1]


def test_ScaleTrainingSAE_builds_on_the_meta_device():
    cfg = ScaleTrainingSAEConfig(
        d_in=512, d_sae=1024, device="meta", decomposition="learned"
    )
    assert all(p.is_meta for p in ScaleTrainingSAE(cfg).parameters())


def test_a_step_under_autocast_has_the_gradients_of_one_without(
    make: Any, sparse: bool
):
    # Every candidate survives, so that rounding changes no selection of latents.
    sae = fresh(make, k=16, use_sparse_activations=sparse, gate="uniform")
    sae.b_enc.data += 10
    x, dead = draw(50, 16), torch.arange(128) % 3 == 0
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = sae.training_forward_pass(step_input(x, dead)).loss
        loss.backward()
        gradients.append({n: p.grad for n, p in sae.named_parameters()})
        sae.zero_grad()
    for name, want in gradients[0].items():
        if want is not None:
            error = (gradients[1][name] - want).norm() / want.norm().clamp(min=1e-6)
            assert error < 0.05, name

"""Training: steps, precisions, diagnostics, initialisation from activations."""

import copy
from typing import Any

import pytest
import torch
from helpers import scale_sae, step_input, switch_sae
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig

from sae_lens_scale import ScaleTrainingSAE, ScaleTrainingSAEConfig
from sae_lens_scale.saes.mixture.initialization import geometric_median


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fresh(architecture: str, **overrides: Any) -> Any:
    torch.manual_seed(0)
    settings = {
        "architecture": architecture,
        "d_in": 16,
        "d_sae": 128,
        "num_experts": 8,
        "k": 4,
    }
    cfg = TrainingSAEConfig.from_dict({**settings, **overrides})
    return TrainingSAE.from_dict(cfg.to_dict())


def train(sae: Any, x: torch.Tensor, steps: int, autocast: bool = False) -> list[float]:
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    dead = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    dead[::3] = True
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


@pytest.mark.parametrize("architecture", ["scale", "switch"])
@pytest.mark.parametrize("overrides", [{}, {"dtype": "bfloat16"}, {"autocast": True}])
def test_training_steps_lower_the_loss_in_every_precision(
    architecture: str, overrides: dict[str, Any]
):
    overrides = dict(overrides)
    autocast = overrides.pop("autocast", False)
    sae = fresh(architecture, **overrides)
    losses = train(sae, draw(200, 16), steps=60, autocast=autocast)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("architecture", ["scale", "switch"])
def test_deepcopy_and_change_of_dtype_keep_the_function(architecture: str):
    sae = fresh(architecture)
    train(sae, draw(200, 16), steps=5)
    x = draw(9, 16, seed=1)
    twin = copy.deepcopy(sae)
    assert torch.equal(twin.encode(x), sae.encode(x))
    with torch.no_grad():
        twin.W_enc.zero_()
    assert (sae.W_enc != 0).any()
    double = copy.deepcopy(sae).to(torch.float64)
    assert double.encode(x).dtype == torch.float64
    torch.testing.assert_close(double(x).float(), sae(x), atol=1e-4, rtol=1e-4)
    half = copy.deepcopy(sae).to(torch.bfloat16)
    assert half.cfg.dtype == "bfloat16"
    assert half.encode(x).dtype == torch.bfloat16
    assert half(x).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("architecture", ["scale", "switch"])
def test_a_batch_with_non_finite_values_stops_training(architecture: str, bad: float):
    x = draw(20, 16)
    x[3, 5] = bad
    sae = fresh(architecture)
    with pytest.raises(ValueError, match="loss is not finite .*NaN or infinite"):
        sae.training_forward_pass(step_input(x))


def test_a_router_gone_wrong_stops_training_though_reconstruction_is_finite():
    sae = fresh("scale", gate="uniform")
    sae.W_router.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="load_balance_loss nan"):
        sae.training_forward_pass(step_input(draw(20, 16)))


def test_an_empty_batch_stops_training_and_says_so():
    with pytest.raises(ValueError, match=r"shape \(0, 16\), .*the batch is empty"):
        fresh("scale").training_forward_pass(step_input(draw(0, 16)))


def test_parameters_and_their_order_are_frozen():
    # Resuming restores the optimiser's state by position.
    names = [name for name, _ in scale_sae(decomposition="learned").named_parameters()]
    assert names == [
        "b_dec",
        "W_dec",
        "W_enc",
        "b_enc",
        "W_router",
        "b_router",
        "omega",
        "W_low_pass",
    ]
    assert [name for name, _ in switch_sae().named_parameters()] == names[:6]
    plain = scale_sae(feature_scaling=False)
    assert [name for name, _ in plain.named_parameters()] == names[:6]


def test_omega_starts_at_zero_and_learns():
    sae = fresh("scale")
    assert (sae.omega == 0).all()
    train(sae, draw(200, 16), steps=5)
    assert (sae.omega != 0).any()


def test_diagnostics_come_on_logging_steps_only():
    sae = fresh("scale")
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


@pytest.mark.parametrize(
    "off",
    ["load_balance_coefficient", "aux_loss_coefficient", "multi_topk_coefficient"],
)
def test_a_coefficient_of_zero_turns_its_loss_off(off: str):
    sae = fresh("scale", **{"multi_topk_coefficient": 0.1, off: 0.0})
    dead = torch.ones(128, dtype=torch.bool)
    losses = sae.training_forward_pass(step_input(draw(50, 16), dead)).losses
    names = {
        "load_balance_coefficient": "load_balance_loss",
        "aux_loss_coefficient": "auxiliary_reconstruction_loss",
        "multi_topk_coefficient": "multi_topk_loss",
    }
    assert set(losses) == {"mse_loss", *names.values()} - {names[off]}


def test_calculate_aux_loss_agrees_with_the_training_step():
    sae = fresh("scale")
    given = step_input(draw(50, 16), torch.arange(128) % 2 == 0)
    output = sae.training_forward_pass(given)
    losses = sae.calculate_aux_loss(
        given, output.feature_acts, output.hidden_pre, output.sae_out
    )
    for name, loss in losses.items():
        torch.testing.assert_close(loss, output.losses[name])


def test_encode_with_hidden_pre_is_d_sae_wide():
    sae = fresh("scale")
    acts, pre = sae.encode_with_hidden_pre(draw(5, 7, 16))
    assert acts.shape == pre.shape == (5, 7, 128)
    assert torch.equal(acts, sae.encode(draw(5, 7, 16)))
    assert ((pre > -torch.inf).sum(-1) == 2 * 16).all()
    active = acts > 0
    gates = sae.route(draw(5, 7, 16)).weights
    assert (acts[active] / pre[active] <= gates.max() + 1e-5).all()


@pytest.mark.parametrize("architecture", ["scale", "switch"])
def test_initialize_from_activations_centres_biases_and_spreads_the_router(
    architecture: str,
):
    sae = fresh(architecture)
    directions = torch.nn.functional.normalize(draw(8, 16), dim=-1)
    x = 4 * directions[torch.arange(800) % 8] + 0.1 * draw(800, 16, seed=1) + 5.0
    sae.initialize_from_activations(x.view(8, 100, 16))
    torch.testing.assert_close(sae.b_dec.data, geometric_median(x))
    assert torch.equal(sae.b_dec, sae.b_router)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    routing = sae.route(x)
    logits = (x - sae.b_router) @ sae.W_router
    assert logits.std().item() == pytest.approx(1.0, abs=1e-3)
    # Tokens of one cluster share their first expert.
    first = routing.indices[:, 0].view(100, 8)
    assert (first == first[0]).float().mean() > 0.95


def test_initialize_from_activations_leaves_shared_experts_out_of_the_clusters():
    sae = scale_sae(experts_per_token=3, num_shared_experts=2)
    sae.initialize_from_activations(draw(500, 10))
    assert (sae.W_router[:, :2] == 0).all()
    assert (sae.W_router[:, 2:].norm(dim=0) > 0).all()


def test_logged_router_metrics_are_of_the_routed_experts():
    sae = scale_sae(experts_per_token=3, num_shared_experts=2)
    output = sae.training_forward_pass(step_input(draw(50, 10), is_logging_step=True))
    load = torch.bincount(sae.route(draw(50, 10)).indices[:, 2] - 2, minlength=3) / 50
    assert output.metrics["router/max_load"] == pytest.approx(3 * load.max().item())


def test_initialize_from_activations_rescales_as_the_trainer_will():
    x = draw(500, 16) * 30 + 100
    sae = fresh("scale", normalize_activations="expected_average_only_in")
    sae.initialize_from_activations(x)
    factor = 4.0 / x.norm(dim=-1).mean()
    torch.testing.assert_close(sae.b_dec.data, geometric_median(x * factor))


def test_initialize_from_activations_normalises_as_the_SAE_will():
    x = draw(500, 16) * 30 + 100
    sae = fresh("scale", normalize_activations="layer_norm", aux_loss_coefficient=0.0)
    sae.initialize_from_activations(x)
    centred = x - x.mean(-1, keepdim=True)
    want = geometric_median(centred / (centred.std(-1, keepdim=True) + 1e-5))
    torch.testing.assert_close(sae.b_dec.data, want)
    copy.deepcopy(sae)  # no activation is left on the SAE


def test_initialize_from_activations_refuses_whitening():
    sae = fresh("scale", normalize_activations="covariance_whitening")
    with pytest.raises(ValueError, match="covariance_whitening"):
        sae.initialize_from_activations(draw(500, 16))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(100, 15), r"last dimension of batch must be d_in=16.*\(100, 15\)"),
        (torch.zeros(7, 16), "at least num_experts=8 tokens, got 7"),
        (torch.full((100, 16), float("nan")), "batch must be finite"),
    ],
)
def test_initialize_from_activations_refuses_bad_batches(
    batch: torch.Tensor, message: str
):
    sae = fresh("scale")
    before = copy.deepcopy(sae.state_dict())
    with pytest.raises(ValueError, match=message):
        sae.initialize_from_activations(batch)
    assert all(torch.equal(before[n], v) for n, v in sae.state_dict().items())


@pytest.mark.parametrize("architecture", ["scale", "switch"])
def test_initialize_from_activations_beats_the_random_start(architecture: str):
    directions = torch.nn.functional.normalize(draw(64, 16), dim=-1)
    choice = torch.randint(64, (2000, 3), generator=torch.Generator().manual_seed(2))
    x = directions[choice].sum(1) * 3 + 2.0
    random, started = fresh(architecture), fresh(architecture)
    started.initialize_from_activations(x)
    assert train(started, x, 40)[-1] < train(random, x, 40)[-1]


def test_ScaleTrainingSAE_builds_on_the_meta_device():
    sae = ScaleTrainingSAE(
        ScaleTrainingSAEConfig(
            d_in=512, d_sae=1024, device="meta", decomposition="learned"
        )
    )
    assert all(p.is_meta for p in sae.parameters())


@pytest.mark.parametrize("architecture", ["scale", "switch"])
@pytest.mark.parametrize("sparse", [True, False])
def test_a_step_under_autocast_has_the_gradients_of_one_without(
    architecture: str, sparse: bool
):
    # Every candidate survives, so that rounding changes no selection of latents.
    sae = fresh(architecture, k=16, use_sparse_activations=sparse, gate="uniform")
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


@pytest.mark.parametrize("architecture", ["scale", "switch"])
def test_attribution_through_dense_activations_works_under_autocast(architecture: str):
    sae = fresh(architecture, k=16)
    sae.b_enc.data += 10
    x = draw(50, 16).requires_grad_()
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            acts = sae.encode(x)
            recons = sae.decode(acts)
        assert (acts != 0).float().mean() > 0.05
        found.append(torch.autograd.grad(recons.sum(), [x, acts]))
    for got, want in zip(found[1], found[0], strict=True):
        assert (got - want).norm() < 0.05 * want.norm()

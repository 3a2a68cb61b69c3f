"""Training runs on cached activations."""

import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import SAE

from reproduction import training as module
from reproduction.activations import ActivationCache, Activations
from reproduction.records import RunRecord
from reproduction.settings import RunSettings
from reproduction.training import GridTrainer, train_run
from sae_lens_scale.saes.mixture import MixtureSAE

SIZES: dict[str, dict[str, Any]] = {
    "scale": {"d_sae": 64, "num_experts": 8, "experts_per_token": 2, "k": 4},
    "switch": {"d_sae": 64, "num_experts": 8, "k": 4},
    "topk": {"d_sae": 16, "k": 4},
    "gated": {"d_sae": 16, "l1_coefficient": 0.5},
    "full": {"d_sae": 64, "k": 4},
}


def settings(architecture: str = "scale", **changes: Any) -> RunSettings:
    defaults: dict[str, Any] = {
        "sae": SIZES[architecture],
        "lr": 3e-3,
        "batch_size": 64,
        "training_tokens": 3_200,
        "dead_after_tokens": 640,
        "tokens_per_expert": 20,
    }
    return RunSettings(architecture, **{**defaults, **changes})


@pytest.fixture(scope="module")
def cache() -> ActivationCache:
    """Sparse combinations of a few directions, off the origin."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40, 12, generator=generator)

    def tokens(n: int) -> Activations:
        strengths = torch.rand(n, 40, generator=generator)
        strengths *= torch.rand(n, 40, generator=generator) < 0.08
        x = 5 + 3 * strengths @ directions
        return Activations([x.bfloat16()])

    return ActivationCache(tokens(2_000), tokens(500), tokens(300))


@pytest.mark.parametrize("architecture", list(SIZES))
def test_a_record_holds_what_the_kept_weights_do_on_held_out_tokens(
    architecture: str, cache: ActivationCache, tmp_path: Path
):
    record = train_run(settings(architecture), cache, tmp_path, keep_weights=True)
    assert RunRecord.read(tmp_path / f"{record.name}.json") == record
    sae = SAE.load_from_disk(tmp_path / record.name)
    assert cache.other_domain is not None
    for activations, found in (
        (cache.in_domain, record.in_domain),
        (cache.other_domain, record.other_domain),
    ):
        assert found is not None
        x = torch.cat(list(activations.batches(7)))
        acts = sae.encode(x)
        errors = (sae.decode(acts) - x).double().square().sum(-1)
        variances = (x - x.mean(0)).double().square().sum(-1)
        assert found["mse"] == pytest.approx(errors.mean().item(), rel=1e-5)
        fvu = errors.mean().item() / variances.mean().item()
        assert found["fvu"] == pytest.approx(fvu, rel=1e-5)
        assert found["explained_variance"] == pytest.approx(1 - fvu, abs=1e-5)
        assert found["l0"] == (acts != 0).sum().item() / len(x)
        assert found["alive"] == (acts != 0).any(0).double().mean().item()
        assert found["tokens"] == len(x)
        assert 0.01 < fvu < 0.9
    assert 0 <= record.dead <= 1
    assert record.sae_cfg["architecture"] == sae.cfg.architecture()
    assert record.sae_cfg["normalize_activations"] == "expected_average_only_in"
    assert record.measures["redundancy"]["num_latents"] == sae.cfg.d_sae
    mixture = architecture in ("scale", "switch")
    assert ("expert_usage" in record.measures) == mixture
    apart = record.measures["redundancy"]["between_experts"]
    assert (apart is not None) == mixture
    assert ("scaling_factors" in record.measures) == (architecture == "scale")
    json.dumps(record.measures, allow_nan=False)
    again = replace(settings(architecture), seed=1)
    assert train_run(again, cache).in_domain != record.in_domain


def test_full_trains_like_SAELenss_TopK(cache: ActivationCache, tmp_path: Path):
    sae = {"d_sae": 64, "k": 4, "dtype": "float64", "aux_loss_coefficient": 1.0}
    runs = [settings(name, sae=sae) for name in ("full", "topk")]
    full, topk = (train_run(r, cache, tmp_path, keep_weights=True) for r in runs)
    # Dead latents had their part in it.
    assert full.dead == topk.dead > 0
    ours, theirs = (SAE.load_from_disk(tmp_path / r.name) for r in (full, topk))
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    for mine, other in zip(full.curve, topk.curve, strict=True):
        assert mine["fvu"] == pytest.approx(other["fvu"], rel=1e-9)


def test_a_seed_decides_the_result_and_leaves_the_callers_randomness(
    cache: ActivationCache,
):
    state = torch.get_rng_state()
    first = train_run(settings(), cache, measures=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    second = train_run(settings(), cache, measures=False)
    assert [p["mse"] for p in first.curve] == [p["mse"] for p in second.curve]
    assert list(first.measures) == ["flops_per_token"]


def test_the_curve_goes_from_the_start_to_the_finished_SAE(cache: ActivationCache):
    record = train_run(settings("topk"), cache)
    tokens = [point["tokens"] for point in record.curve]
    assert (tokens[0], tokens[1], tokens[-1]) == (0, 64, 3_200)
    assert tokens == sorted(set(tokens))
    seconds = [point["seconds"] for point in record.curve]
    assert seconds == sorted(seconds)
    assert record.seconds["initialization"] <= seconds[0]
    assert seconds[-1] <= record.seconds["training"] <= record.seconds["total"]
    for name in ("mse", "fvu"):
        # All held-out tokens fit into the curve's sample here.
        last = record.curve[-1][name]
        assert last == pytest.approx(record.in_domain[name], rel=1e-4)
        assert last < record.curve[0][name]
    assert not train_run(settings("topk", curve_tokens=0), cache).curve


def test_seconds_of_training_contain_no_evaluation(
    cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
):
    def slow(*_: Any) -> dict[str, float]:
        time.sleep(0.1)
        return {"mse": 1.0, "fvu": 1.0}

    monkeypatch.setattr(module, "reconstruction_error", slow)
    record = train_run(settings("topk"), cache, measures=False)
    assert len(record.curve) > 20
    assert record.seconds["training"] < 0.1 * len(record.curve)
    assert record.seconds["total"] > 0.1 * len(record.curve)


def test_a_recorded_run_is_not_repeated(
    cache: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = settings("topk")
    record = train_run(run, cache, tmp_path)
    path = tmp_path / f"{run.name}.json"

    def fit(_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(GridTrainer, "fit", fit)
    assert train_run(run, cache, tmp_path) == record
    old = json.loads(path.read_text())
    # A record from before there was this field.
    del old["sae_cfg"]["use_sparse_activations"]
    path.write_text(json.dumps(old))
    train_run(run, cache, tmp_path)
    # One that says less about its SAE, which is the same.
    old["settings"]["sae"] = {"d_sae": old["sae_cfg"]["d_sae"]}
    path.write_text(json.dumps(old))
    train_run(run, cache, tmp_path)
    # And one from when a default was another.
    old["sae_cfg"]["rescale_acts_by_decoder_norm"] = False
    path.write_text(json.dumps(old))
    message = "rescale_acts_by_decoder_norm=False, now it would be True: move it away"
    with pytest.raises(ValueError, match=message):
        train_run(run, cache, tmp_path)
    with pytest.raises(AssertionError, match="trained again"):
        train_run(replace(run, lr=1e-3), cache, tmp_path)


def test_an_interrupted_run_leaves_nothing(
    cache: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def customize(trainer: GridTrainer, _: Activations) -> None:
        trainer.after_step.append(interrupt)

    output = tmp_path / "runs"
    with pytest.raises(KeyboardInterrupt):
        train_run(settings(), cache, output, keep_weights=True, customize=customize)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "asdict", interrupt)
        train_run(settings(), cache, output, keep_weights=True)
    assert not output.exists()
    train_run(settings(), cache, output, keep_weights=True)
    assert {path.suffix for path in output.iterdir()} == {"", ".json"}


def test_parameters_can_have_learning_rates_of_their_own(cache: ActivationCache):
    start: dict[str, torch.Tensor] = {}
    end: dict[str, torch.Tensor] = {}

    def customize(trainer: GridTrainer, _: Activations) -> None:
        start.update(copy.deepcopy(trainer.sae.state_dict()))
        trainer.after_step.append(
            lambda t: end.update(copy.deepcopy(t.sae.state_dict()))
        )

    plain = train_run(settings(), cache, measures=False)
    ones = settings(lr_factors={"W_router": 1.0, "omega": 1.0})
    equal = train_run(ones, cache, measures=False)
    assert plain.curve[-1]["mse"] == equal.curve[-1]["mse"]
    frozen = settings(lr_factors={"W_router": 0.0, "omega": 10.0})
    train_run(frozen, cache, measures=False, customize=customize)
    assert torch.equal(start["W_router"], end["W_router"])
    assert not torch.equal(start["W_enc"], end["W_enc"])
    with pytest.raises(ValueError, match=r"must name parameters of the SAE .*'nonse"):
        train_run(settings(lr_factors={"nonsense": 1.0}), cache)


def test_variants_can_change_every_step(cache: ActivationCache):
    def anneal(trainer: GridTrainer) -> None:
        trainer.sae.cfg.k = 8 if trainer.n_training_samples < 1_600 else 4

    def customize(trainer: GridTrainer, train: Activations) -> None:
        assert len(train) == 2_000
        trainer.after_step.append(anneal)

    run = settings(variant="annealed")
    record = train_run(run, cache, customize=customize)
    assert record.label == "Scale 8/2 annealed"
    plain = train_run(settings(), cache)
    assert record.in_domain["l0"] <= 4
    assert record.in_domain["fvu"] != plain.in_domain["fvu"]
    # The record has the settings, whatever a variant does to the SAE.
    assert record.sae_cfg == plain.sae_cfg


@pytest.mark.parametrize("name", ["none", "expected_average_only_in", "layer_norm"])
def test_dense_SAEs_start_at_the_median_in_their_own_units(
    name: str, cache: ActivationCache
):
    seen: dict[str, float] = {}

    def customize(trainer: GridTrainer, train: Activations) -> None:
        x = trainer.activation_scaler(train.sample(2_000))
        x = trainer.sae.run_time_activation_norm_fn_in(x)
        center = trainer.sae.b_dec.detach()
        seen["distance"] = (x - center).norm(dim=-1).mean().item()
        seen["spread"] = (x - x.median(0).values).norm(dim=-1).mean().item()

    sae = {**SIZES["gated"], "normalize_activations": name}
    train_run(settings("gated", sae=sae), cache, measures=False, customize=customize)
    assert seen["distance"] <= seen["spread"] * 1.001


def test_other_schedules_and_whitening_train(cache: ActivationCache):
    sae = {**SIZES["topk"], "normalize_activations": "covariance_whitening"}
    run = settings("topk", sae=sae, lr_scheduler_name="cosineannealing", lr_end=1e-4)
    record = train_run(run, cache, measures=False)
    assert record.in_domain["fvu"] < 0.99 * record.curve[0]["fvu"]
    assert record.curve[-1]["fvu"] == pytest.approx(record.in_domain["fvu"], rel=1e-3)
    with pytest.raises(ValueError, match="covariance_whitening"):
        train_run(settings(sae={**SIZES["scale"], **sae, "d_sae": 64}), cache)


def test_further_measures_are_those_of_the_SAE_on_held_out_tokens(
    cache: ActivationCache, tmp_path: Path
):
    run = settings("scale", sae={**SIZES["scale"], "experts_per_token": 3})
    record = train_run(run, cache, tmp_path, keep_weights=True)
    sae = SAE.load_from_disk(tmp_path / record.name)
    assert isinstance(sae, MixtureSAE)
    x = torch.cat(list(cache.in_domain.batches(100)))
    fired = (sae.encode(x) != 0).float()
    alive = fired.any(dim=0)
    assert 2 <= alive.sum() < len(alive)
    found = record.measures
    directions = torch.nn.functional.normalize(sae.W_dec.detach(), dim=-1)
    cosines = (directions @ directions.T).fill_diagonal_(-1)
    largest = cosines.amax(dim=-1).mean().item()
    among_alive = cosines[alive][:, alive].amax(dim=-1).mean().item()
    of_all = found["redundancy"]
    assert of_all["mean_max_cosine"] == pytest.approx(largest, abs=1e-5)
    assert of_all["alive"]["num_latents"] == alive.sum()
    assert of_all["alive"]["mean_max_cosine"] == pytest.approx(among_alive, abs=1e-5)
    common = fired @ fired.T
    pairs = common[~torch.eye(len(x), dtype=torch.bool)]
    similarity = found["activation_similarity"]
    assert similarity["similarity"] == pytest.approx(pairs.mean().item() / 4, rel=1e-5)
    counts = (pairs.long().bincount(minlength=5) // 2).tolist()
    assert found["overlap_histogram"]["pairs"] == counts
    selected = torch.nn.functional.one_hot(sae.route(x).indices, 8).sum(dim=1)
    assert found["expert_usage"]["counts"] == selected.sum(dim=0).tolist()
    together = (selected.T @ selected).fill_diagonal_(0)
    used = found["expert_coactivation"]["pairs_used"]
    assert used == together.count_nonzero() / 2
    within = [
        (rows @ rows.T)[~torch.eye(8, dtype=torch.bool)].mean().item()
        for rows in directions.split(8)
    ]
    assert "per_expert" not in found["expert_similarity"]
    intra = found["expert_similarity"]["intra"]["mean_cosine"]
    assert intra == pytest.approx(sum(within) / 8, abs=1e-5)
    assert found["scaling_factors"] == sae.cfg.metadata.omega


def test_a_collapsed_SAE_has_a_record(cache: ActivationCache, tmp_path: Path):
    def collapse(trainer: GridTrainer, _: Activations) -> None:
        trainer.sae.b_gate.data.fill_(-100)

    record = train_run(settings("gated"), cache, tmp_path, customize=collapse)
    assert record == RunRecord.read(tmp_path / f"{record.name}.json")
    assert record.in_domain["l0"] == 0
    assert record.measures["redundancy"]["alive"] is None
    assert "activation_similarity" not in record.measures


@pytest.mark.parametrize(
    ("architecture", "training_steps", "most"),
    [("scale", 300, 5), ("topk", 300, 100), ("topk", 30, 30)],
)
def test_a_run_that_diverges_ends_early(
    architecture: str, training_steps: int, most: int, cache: ActivationCache
):
    steps = []

    def count(trainer: GridTrainer, _: Activations) -> None:
        trainer.after_step.append(steps.append)

    run = settings(architecture, lr=1e38, lr_warm_up_fraction=0.0)
    run = replace(run, training_tokens=training_steps * run.batch_size)
    with pytest.raises(ValueError, match="the loss is not finite at training step"):
        train_run(run, cache, customize=count)
    assert len(steps) <= most

"""Folds, exports and loading leave what the SAE computes as it was."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close, draw, exported, scale_sae, switch_sae
from sae_lens.saes.sae import SAE, TrainingSAE

from sae_lens_scale import ScaleSAE, SwitchSAE

X = draw(40, 10, seed=1)
every_mixture = pytest.mark.parametrize(
    "make",
    [
        pytest.param(scale_sae, id="mean"),
        pytest.param(partial(scale_sae, decomposition="identity"), id="identity"),
        pytest.param(partial(scale_sae, decomposition="learned"), id="learned"),
        pytest.param(partial(scale_sae, feature_scaling=False), id="plain"),
        pytest.param(partial(scale_sae, topk_over="gated_activations"), id="gated"),
        pytest.param(switch_sae, id="switch"),
    ],
)
rescaled_or_not = pytest.mark.parametrize("rescale", [True, False])
with_or_without_b_dec = pytest.mark.parametrize("apply_b_dec", [True, False])


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (expected != 0).any(), "a test of zeros proves nothing"
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


def assert_same_sae(actual: Any, expected: Any) -> None:
    assert_same(actual.encode(X), expected.encode(X))
    assert_same(actual(X), expected(X))


@every_mixture
@rescaled_or_not
@with_or_without_b_dec
def test_norm_scaling_folds_exactly_router_included(
    make: Any, rescale: bool, apply_b_dec: bool
):
    sae = make(
        rescale_acts_by_decoder_norm=rescale,
        apply_b_dec_to_input=apply_b_dec,
        normalize_activations="expected_average_only_in",
    )
    acts, out, routing = sae.encode(X), sae(X), sae.route(X)
    sae.fold_activation_norm_scaling_factor(2.5)
    raw = X / 2.5
    assert sae.cfg.normalize_activations == "none"
    assert torch.equal(sae.route(raw).indices, routing.indices)
    # Rescaled activations carry decoder norms, which the fold has divided.
    assert_same(sae.encode(raw), acts / 2.5 if rescale else acts)
    assert_same(sae(raw), out / 2.5)


@every_mixture
@rescaled_or_not
@with_or_without_b_dec
def test_whitening_folds_exactly_router_included(
    make: Any, rescale: bool, apply_b_dec: bool
):
    sae = make(
        rescale_acts_by_decoder_norm=rescale,
        apply_b_dec_to_input=apply_b_dec,
        normalize_activations="covariance_whitening",
    )
    mean, whitening = draw(10, seed=5), draw(10, 10, seed=6)
    inverse = torch.linalg.inv(whitening)
    acts, out, routing = sae.encode(X), sae(X), sae.route(X)
    raw = X @ inverse + mean
    sae.fold_activation_whitening(mean, whitening, inverse)
    assert torch.equal(sae.route(raw).indices, routing.indices)
    assert_same(sae.encode(raw), acts)
    assert_same(sae(raw), out @ inverse + mean)


@every_mixture
def test_decoder_norm_folds_exactly_when_selection_is_by_decoder_norm(make: Any):
    sae = make(rescale_acts_by_decoder_norm=True)
    before = copy.deepcopy(sae)
    sae.fold_W_dec_norm()
    assert_close(sae.W_dec.norm(dim=-1), torch.ones(60, dtype=torch.float64))
    assert_same_sae(sae, before)


@every_mixture
def test_decoder_norm_is_not_folded_when_that_would_change_the_selection(make: Any):
    sae = make(rescale_acts_by_decoder_norm=False)
    before = copy.deepcopy(sae.state_dict())
    with pytest.raises(NotImplementedError, match="rescale_acts_by_decoder_norm"):
        sae.fold_W_dec_norm()
    assert_close(sae.state_dict(), before, atol=0)


@every_mixture
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_unit_decoder_norms_fold_without_any_change(
    make: Any, dtype: str, tmp_path: Path
):
    trained = make(rescale_acts_by_decoder_norm=False).float()
    trained.W_dec.data /= trained.W_dec.data.norm(dim=-1, keepdim=True)
    trained.save_inference_model(tmp_path)
    sae = SAE.load_from_disk(tmp_path, dtype=dtype)
    before = copy.deepcopy(sae.state_dict())
    norms = sae.fold_and_get_W_dec_norm()
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-2, rtol=0)
    assert_close(sae.state_dict(), before, atol=0)
    # One row of another norm is enough for a refusal.
    sae.W_dec.data[3] *= 1.1
    with pytest.raises(NotImplementedError, match="norms other than 1"):
        sae.fold_W_dec_norm()


@every_mixture
@rescaled_or_not
@with_or_without_b_dec
def test_exports_equal_the_training_SAE_and_training_goes_on_from_them(
    make: Any, rescale: bool, apply_b_dec: bool, tmp_path: Path
):
    sae = make(rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=apply_b_dec)
    before = copy.deepcopy(sae.state_dict())
    loaded = exported(sae, tmp_path)
    # Saving must not touch the live parameters, which the state dict aliases.
    assert_close(sae.state_dict(), before, atol=0)
    assert isinstance(loaded, (ScaleSAE, SwitchSAE))
    assert_same_sae(loaded, sae)
    resumed = TrainingSAE.load_from_disk(tmp_path)
    assert_same_sae(resumed, sae)
    omega = getattr(resumed, "omega", None)
    assert omega is None or (omega == 0).all()


@every_mixture
def test_checkpoints_load_for_inference_and_for_training_unchanged(
    make: Any, tmp_path: Path
):
    sae = make()
    sae.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert isinstance(loaded, (ScaleSAE, SwitchSAE))
    assert_same_sae(loaded, sae)
    resumed = TrainingSAE.load_from_disk(tmp_path)
    assert type(resumed) is type(sae)
    assert resumed.cfg.to_dict() == sae.cfg.to_dict()
    assert_close(resumed.state_dict(), sae.state_dict(), atol=0)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scaling_factor_that_cannot_be_undone_is_refused(make: Any, factor: float):
    sae = make(normalize_activations="expected_average_only_in")
    before = copy.deepcopy(sae.state_dict())
    with pytest.raises(ValueError, match=f"scaling_factor must be .*, got {factor}"):
        sae.fold_activation_norm_scaling_factor(factor)
    assert_close(sae.state_dict(), before, atol=0)
    assert sae.cfg.normalize_activations == "expected_average_only_in"


@pytest.mark.parametrize(
    ("norm", "fold"),
    [
        (
            "expected_average_only_in",
            lambda sae: sae.fold_activation_norm_scaling_factor(1e-4),
        ),
        (
            "covariance_whitening",
            lambda sae: sae.fold_activation_whitening(
                torch.zeros(10), 1e-4 * torch.eye(10), 1e4 * torch.eye(10)
            ),
        ),
    ],
    ids=["scaling", "whitening"],
)
def test_a_fold_for_which_float16_is_too_small_changes_nothing(
    make: Any, norm: str, fold: Any
):
    sae = make(dtype="float16", normalize_activations=norm)
    sae.b_router.data[0] = 100
    before = copy.deepcopy(sae.state_dict())
    cfg = copy.deepcopy(sae.cfg)
    with pytest.raises(ValueError, match="float16 is too small for the router"):
        fold(sae)
    assert_close(sae.state_dict(), before, atol=0)
    assert sae.cfg == cfg


def test_omegas_stay_on_record_in_the_metadata_of_their_time(tmp_path: Path):
    sae: Any = scale_sae()
    omega = sae.omega.tolist()
    assert exported(sae, tmp_path / "export").cfg.metadata.omega == omega
    sae.omega.data += 1
    omega = sae.omega.tolist()
    sae.save_model(tmp_path / "checkpoint")
    loaded = SAE.load_from_disk(tmp_path / "checkpoint")
    assert loaded.cfg.metadata.omega == omega
    # A fold that spends omega still leaves it on record.
    sae.fold_W_dec_norm()
    assert (sae.omega == 0).all()
    assert exported(sae, tmp_path / "folded").cfg.metadata.omega == omega


@pytest.mark.parametrize("decomposition", ["mean", "identity"])
def test_omegas_stay_on_record_in_checkpoints_saved_after_a_fold(
    decomposition: str, tmp_path: Path
):
    sae: Any = scale_sae(decomposition=decomposition)
    omega = sae.omega.tolist()
    sae.fold_activation_norm_scaling_factor(2.0)
    sae.fold_W_dec_norm()
    sae.save_model(tmp_path)
    assert SAE.load_from_disk(tmp_path).cfg.metadata.omega == omega


@pytest.mark.parametrize(
    "overrides",
    [
        {"normalize_activations": "layer_norm", "aux_loss_coefficient": 0.0},
        {"feature_scaling": False},
        {"decomposition": "identity", "load_balance_coefficient": 0.7},
    ],
    ids=str,
)
def test_training_goes_on_from_an_export_with_the_settings_it_had(
    overrides: dict[str, Any], tmp_path: Path
):
    sae = scale_sae(**overrides)
    sae.save_inference_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert {name: getattr(loaded.cfg, name) for name in overrides} == overrides
    assert_same(loaded(X), sae(X))


def test_a_checkpoint_loaded_in_bfloat16_is_folded_in_float32(tmp_path: Path):
    # Parameters that bfloat16 holds exactly: only the result is rounded.
    sae = scale_sae().to(torch.bfloat16).to(torch.float64)
    sae.save_model(tmp_path)
    got = SAE.load_from_disk(tmp_path, dtype="bfloat16").W_enc.double()
    want = sae.effective_W_enc()
    torch.testing.assert_close(got, want, rtol=2**-8, atol=1e-5)


def test_a_checkpoint_that_does_not_say_how_omega_applies_is_refused(tmp_path: Path):
    scale_sae().save_model(tmp_path)
    cfg_path = tmp_path / "cfg.json"
    cfg_path.write_text(cfg_path.read_text().replace('"mean"', '"median"'))
    with pytest.raises(ValueError, match="decomposition.*'median'"):
        SAE.load_from_disk(tmp_path)


@pytest.mark.parametrize(
    ("decomposition", "kept"), [("mean", True), ("learned", True), ("identity", False)]
)
def test_ScaleTrainingSAE_keeps_omega_through_norm_scaling_unless_identity(
    decomposition: str, kept: bool
):
    sae: Any = scale_sae(decomposition=decomposition)
    sae.fold_activation_norm_scaling_factor(2.0)
    assert bool(sae.omega.any()) == kept

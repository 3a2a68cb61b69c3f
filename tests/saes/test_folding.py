"""Folds, exports and loading leave what the SAE computes as it was."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import scale_sae, switch_sae
from sae_lens.saes.sae import SAE, TrainingSAE

from sae_lens_scale import ScaleSAE, ScaleTrainingSAE, SwitchSAE

X = torch.randn(40, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MIXTURES = [
    pytest.param(lambda **o: scale_sae(**o), id="scale-mean"),
    pytest.param(
        lambda **o: scale_sae(decomposition="identity", **o), id="scale-identity"
    ),
    pytest.param(
        lambda **o: scale_sae(decomposition="learned", **o), id="scale-learned"
    ),
    pytest.param(lambda **o: scale_sae(feature_scaling=False, **o), id="scale-plain"),
    pytest.param(
        lambda **o: scale_sae(topk_over="gated_activations", **o), id="scale-gated"
    ),
    pytest.param(lambda **o: switch_sae(**o), id="switch"),
]


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (expected != 0).any(), "a test of zeros proves nothing"
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("make", MIXTURES)
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("apply_b_dec", [True, False])
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


@pytest.mark.parametrize("make", MIXTURES)
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_whitening_folds_exactly_router_included(
    make: Any, rescale: bool, apply_b_dec: bool
):
    sae = make(
        rescale_acts_by_decoder_norm=rescale,
        apply_b_dec_to_input=apply_b_dec,
        normalize_activations="covariance_whitening",
    )
    generator = torch.Generator().manual_seed(5)
    mean = torch.randn(10, dtype=torch.float64, generator=generator)
    whitening = torch.randn(10, 10, dtype=torch.float64, generator=generator)
    inverse = torch.linalg.inv(whitening)
    acts, out, routing = sae.encode(X), sae(X), sae.route(X)
    raw = X @ inverse + mean
    sae.fold_activation_whitening(mean, whitening, inverse)
    assert torch.equal(sae.route(raw).indices, routing.indices)
    assert_same(sae.encode(raw), acts)
    assert_same(sae(raw), out @ inverse + mean)


@pytest.mark.parametrize("make", MIXTURES)
def test_decoder_norm_folds_exactly_when_selection_is_by_decoder_norm(make: Any):
    sae = make(rescale_acts_by_decoder_norm=True)
    acts, out = sae.encode(X), sae(X)
    sae.fold_W_dec_norm()
    torch.testing.assert_close(
        sae.W_dec.norm(dim=-1), torch.ones(60, dtype=torch.float64)
    )
    assert_same(sae.encode(X), acts)
    assert_same(sae(X), out)


@pytest.mark.parametrize("make", MIXTURES)
def test_decoder_norm_is_not_folded_when_that_would_change_the_selection(make: Any):
    sae = make(rescale_acts_by_decoder_norm=False)
    before = copy.deepcopy(sae.state_dict())
    with pytest.raises(NotImplementedError, match="rescale_acts_by_decoder_norm"):
        sae.fold_W_dec_norm()
    assert all(torch.equal(before[n], v) for n, v in sae.state_dict().items())


@pytest.mark.parametrize(
    ("make", "rescale", "apply_b_dec"),
    list(itertools.product(MIXTURES, [True, False], [True, False])),
)
def test_exported_inference_SAE_equals_the_training_SAE(
    make: Any, rescale: bool, apply_b_dec: bool, tmp_path: Path
):
    make = make.values[0]
    sae = make(rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=apply_b_dec)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    sae.save_inference_model(tmp_path)
    # Saving must not touch the live parameters, which the state dict aliases.
    assert all(torch.equal(before[n], v) for n, v in sae.state_dict().items())
    loaded = SAE.load_from_disk(tmp_path)
    assert isinstance(loaded, (ScaleSAE, SwitchSAE))
    assert_same(loaded.encode(X), sae.encode(X))
    assert_same(loaded(X), sae(X))


@pytest.mark.parametrize("make", MIXTURES)
def test_SAE_loads_a_training_checkpoint_as_inference_SAE(make: Any, tmp_path: Path):
    sae = make()
    sae.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert isinstance(loaded, (ScaleSAE, SwitchSAE))
    assert_same(loaded.encode(X), sae.encode(X))
    assert_same(loaded(X), sae(X))


@pytest.mark.parametrize("make", MIXTURES)
def test_TrainingSAE_loads_its_checkpoint_unchanged(make: Any, tmp_path: Path):
    sae = make()
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert type(loaded) is type(sae)
    assert loaded.cfg.to_dict() == sae.cfg.to_dict()
    want = sae.state_dict()
    assert loaded.state_dict().keys() == want.keys()
    assert all(torch.equal(want[n], v) for n, v in loaded.state_dict().items())


@pytest.mark.parametrize("make", MIXTURES)
def test_TrainingSAE_goes_on_from_an_inference_export(make: Any, tmp_path: Path):
    sae = make()
    sae.save_inference_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert_same(loaded.encode(X), sae.encode(X))
    assert_same(loaded(X), sae(X))
    omega = getattr(loaded, "omega", None)
    assert omega is None or (omega == 0).all()


def test_learned_omegas_are_kept_in_the_metadata(tmp_path: Path):
    sae = scale_sae()
    assert sae.omega is not None
    omega = sae.omega.tolist()
    sae.save_inference_model(tmp_path / "export")
    loaded = SAE.load_from_disk(tmp_path / "export")
    assert loaded.cfg.metadata.omega == omega
    sae.save_model(tmp_path / "checkpoint")
    loaded = SAE.load_from_disk(tmp_path / "checkpoint")
    assert loaded.cfg.metadata.omega == omega
    # A fold that spends omega still leaves it on record.
    sae.fold_W_dec_norm()
    assert (sae.omega == 0).all()
    sae.save_inference_model(tmp_path / "folded")
    loaded = SAE.load_from_disk(tmp_path / "folded")
    assert loaded.cfg.metadata.omega == omega


@pytest.mark.parametrize("decomposition", ["mean", "identity"])
def test_omegas_stay_on_record_in_checkpoints_saved_after_a_fold(
    decomposition: str, tmp_path: Path
):
    sae = scale_sae(decomposition=decomposition)
    assert sae.omega is not None
    omega = sae.omega.tolist()
    sae.fold_activation_norm_scaling_factor(2.0)
    sae.fold_W_dec_norm()
    sae.save_model(tmp_path)
    assert SAE.load_from_disk(tmp_path).cfg.metadata.omega == omega


def test_a_checkpoint_records_the_omegas_of_its_own_time(tmp_path: Path):
    sae = scale_sae()
    assert sae.omega is not None
    sae.save_inference_model(tmp_path)
    sae.omega.data += 1
    sae.save_model(tmp_path)
    metadata = SAE.load_from_disk(tmp_path).cfg.metadata
    assert metadata.omega == sae.omega.tolist()


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
    for name, value in overrides.items():
        assert getattr(loaded.cfg, name) == value
    assert_same(loaded(X), sae(X))


def test_a_checkpoint_loaded_in_bfloat16_is_folded_in_float32(tmp_path: Path):
    sae = scale_sae()
    sae.save_model(tmp_path)
    want = sae.effective_W_enc()
    got = SAE.load_from_disk(tmp_path, dtype="bfloat16").W_enc.double()
    # Rounding of the inputs and of the result, and nothing in between.
    assert ((got - want).norm() / want.norm()) < 2 * 2**-8


def test_a_checkpoint_that_does_not_say_how_omega_applies_is_refused(tmp_path: Path):
    sae = scale_sae()
    sae.save_model(tmp_path)
    cfg_path = tmp_path / "cfg.json"
    cfg_path.write_text(cfg_path.read_text().replace('"mean"', '"median"'))
    with pytest.raises(ValueError, match="decomposition.*'median'"):
        SAE.load_from_disk(tmp_path)


def test_ScaleTrainingSAE_keeps_omega_through_norm_scaling_unless_identity():
    for decomposition, kept in (("mean", True), ("learned", True), ("identity", False)):
        sae: ScaleTrainingSAE = scale_sae(decomposition=decomposition)
        sae.fold_activation_norm_scaling_factor(2.0)
        assert sae.omega is not None
        assert bool(sae.omega.any()) == kept


@pytest.mark.parametrize("make", MIXTURES)
def test_a_decoder_row_of_zeros_yields_no_nan(make: Any, tmp_path: Path):
    sae = make(rescale_acts_by_decoder_norm=True)
    sae.W_dec.data[3] = 0
    out = sae(X)
    assert out.isfinite().all()
    sae.save_inference_model(tmp_path)
    assert_same(SAE.load_from_disk(tmp_path)(X), out)
    out.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in sae.parameters())

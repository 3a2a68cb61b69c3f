"""A config that was changed after its SAE was built: no file is lost, nothing is regrouped."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import X, assert_close, inference, scale_sae, step_input
from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.saes.topk_sae import TopK
from torch import nn


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Fields, values that do not fit, and parts of the message.
CHANGES: list[tuple[str, Any, str]] = [
    ("k", 10**6, r"k must be at most .* got 1000000"),
    ("k", "6", r"k must be a positive integer, got '6'"),
    ("topk_over", "x", r"topk_over must be one of .* got 'x'"),
    ("gate", "x", r"gate must be one of .* got 'x'"),
    ("dtype", "float31", "Invalid dtype: float31"),
    ("num_experts", 4, r"W_router of shape \(10, 5\) .* num_experts=4"),
    ("num_experts", 10, r"W_router of shape \(10, 5\) .* num_experts=10"),
    ("d_sae", 120, r"W_(enc|dec) of shape \(.*60.*\) .* d_sae=120"),
    ("d_in", 11, r"\(10, .*d_in=11"),
    ("rescale_acts_by_decoder_norm", "no", "must be a bool, got 'no'"),
]
OF_TRAINING: list[tuple[str, Any, str]] = [
    ("aux_loss_coefficient", -1, "aux_loss_coefficient must be .* got -1"),
    ("router_lr_factor", 1.0, r"router_lr_factor must be 0.125, .* got 1.0"),
    ("experts_per_token", 6, "experts_per_token must be at most .* got 6"),
    ("decomposition", "median", "decomposition must be one of .* got 'median'"),
    ("decomposition", "learned", "'learned' needs an SAE with W_low_pass"),
    ("feature_scaling", False, "feature_scaling=False .* an SAE without omega"),
]


@pytest.mark.parametrize(("field", "value", "message"), CHANGES + OF_TRAINING)
@pytest.mark.parametrize("method", ["save_model", "save_inference_model"])
def test_a_config_that_could_not_be_loaded_is_not_saved(
    method: str, field: str, value: Any, message: str, tmp_path: Path
):
    sae: Any = scale_sae()
    getattr(sae, method)(tmp_path)
    before = contents(tmp_path)
    setattr(sae.cfg, field, value)
    with pytest.raises(ValueError, match=message):
        getattr(sae, method)(tmp_path)
    assert contents(tmp_path) == before
    with pytest.raises(ValueError, match=message):
        getattr(sae, method)(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("field", "value", "message"), CHANGES)
def test_a_loaded_sae_with_another_config_is_not_saved(
    field: str, value: Any, message: str, tmp_path: Path
):
    inference(scale_sae()).save_model(tmp_path)
    before = contents(tmp_path)
    sae = SAE.load_from_disk(tmp_path)
    setattr(sae.cfg, field, value)
    with pytest.raises(ValueError, match=message):
        sae.save_model(tmp_path)
    assert contents(tmp_path) == before


def test_changes_that_fit_are_saved(make_either: Any, tmp_path: Path):
    sae = make_either()
    sae.cfg.k = np.int64(3)
    sae.cfg.gate = "double_softmax"
    sae.save_model(tmp_path)
    base = TrainingSAE if isinstance(sae, TrainingSAE) else SAE
    loaded = base.load_from_disk(tmp_path)
    assert (loaded.cfg.k, loaded.cfg.gate) == (3, "double_softmax")
    assert_close(loaded(X), sae(X))


class OwnTopK(TopK):
    """A TopK of a user's."""


@pytest.mark.parametrize("kind", [TopK, OwnTopK])
def test_a_k_that_only_activation_fn_has_is_not_lost(
    kind: type[TopK], make_either: Any, tmp_path: Path
):
    sae = make_either()
    sae.activation_fn = kind(4)
    with pytest.raises(ValueError, match="k must be 4, as in activation_fn, got 6"):
        sae.save_model(tmp_path)
    sae.cfg.k = 4
    sae.save_model(tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["k"] == 4


def test_saving_warns_of_nothing(make: Any, tmp_path: Path):
    sae = make().to(torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sae.save_model(tmp_path)


REGROUPED: list[tuple[str, Any, str]] = [
    ("num_experts", 10, "num_experts=10"),
    ("num_experts", 4, "num_experts=4"),
    ("d_sae", 120, "d_sae=120"),
    ("gate", "x", "gate must be one of .* got 'x'"),
    ("experts_per_token", 6, "experts_per_token must be at most num_experts=5, got 6"),
    ("experts_per_token", 0, "experts_per_token must be a positive integer, got 0"),
    ("experts_per_token", 2.0, "experts_per_token must be a positive .* got 2.0"),
    ("num_shared_experts", 2, "num_shared_experts must be .* got 2"),
    ("num_shared_experts", -1, "num_shared_experts must be .* got -1"),
]
SELECTED: list[tuple[str, Any, str]] = [
    ("topk_over", "x", "topk_over must be one of .* got 'x'"),
    ("k", 2.5, "k must be an integer from 1 to .* got 2.5"),
    ("k", "6", "k must be an integer from 1 to .* got '6'"),
    ("k", True, "k must be an integer from 1 to .* got True"),
    ("decomposition", "x", "decomposition must be one of .* got 'x'"),
    ("decomposition", "learned", "'learned' needs an SAE with W_low_pass"),
    ("feature_scaling", False, "feature_scaling=False .* an SAE without omega"),
]


@pytest.mark.parametrize(
    ("method", "field", "value", "message"),
    [
        *(("route", *change) for change in REGROUPED),
        *(
            (method, *change)
            for method in ("encode", "forward", "training_forward_pass")
            for change in REGROUPED + SELECTED
        ),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused_in_use(
    method: str, field: str, value: Any, message: str
):
    sae: Any = scale_sae()
    setattr(sae.cfg, field, value)
    x = step_input(X) if method == "training_forward_pass" else X
    with pytest.raises(ValueError, match=message):
        getattr(sae, method)(x)


@pytest.mark.parametrize("name", ["W_dec", "W_enc", "b_enc", "W_router"])
def test_weights_of_some_latents_are_refused_and_the_sae_stays_whole(
    make_either: Any, name: str
):
    # As SAEDashboard cuts those of architectures that it does not know.
    sae = make_either()
    want = sae(X)
    dim = -1 if name in ("W_enc", "W_router") else 0
    some = getattr(sae, name).detach().index_select(dim, torch.tensor([1, 3, 4]))
    with pytest.raises(ValueError, match=rf"{name} of shape .*3.* does not fit"):
        setattr(sae, name, nn.Parameter(some))
    assert torch.equal(sae(X), want)


def test_weights_may_be_replaced_and_cut_along_with_the_config(make: Any):
    sae = inference(make())
    want = copy.deepcopy(sae)
    sae.W_dec = nn.Parameter(2 * sae.W_dec.detach())
    assert torch.equal(sae.encode(X) > 0, want.encode(X) > 0)
    # The first three experts of five, and no others.
    sae.cfg.num_experts, sae.cfg.d_sae = 3, 36
    sae.W_enc = nn.Parameter(sae.W_enc[:, :36].detach())
    sae.b_enc = nn.Parameter(sae.b_enc[:36].detach())
    sae.W_dec = nn.Parameter(want.W_dec[:36].detach())
    sae.W_router = nn.Parameter(sae.W_router[:, :3].detach())
    indices = want.route(X).indices
    same = (indices < 3).all(-1)
    assert 0 < same.sum() < len(X)
    assert torch.equal(sae.route(X[same]).indices, indices[same])

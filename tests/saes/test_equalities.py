"""Settings in which our SAEs equal SAELens's, or each other."""

from typing import Any

import pytest
import torch
from helpers import (
    DEAD,
    assert_close,
    draw,
    randomize,
    scale_sae,
    step_input,
    switch_sae,
)
from sae_lens.saes.topk_sae import (
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)

from sae_lens_scale import ScaleSAE, ScaleSAEConfig

SHARED: dict[str, Any] = {"d_in": 10, "d_sae": 60, "k": 6}
ONE_EXPERT: dict[str, Any] = {
    "num_experts": 1,
    "experts_per_token": 1,
    "gate": "uniform",
}
X = draw(31, 10, seed=1)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_ScaleSAE_with_one_expert_equals_TopKSAE_bit_for_bit(
    rescale: bool, apply_b_dec: bool, dtype: str
):
    settings = {
        **SHARED,
        "rescale_acts_by_decoder_norm": rescale,
        "apply_b_dec_to_input": apply_b_dec,
        "dtype": dtype,
    }
    topk = TopKSAE(TopKSAEConfig(**settings))
    randomize(topk)
    scale = ScaleSAE(ScaleSAEConfig(**settings, **ONE_EXPERT))
    scale.load_state_dict(topk.state_dict(), strict=False)
    x = X[:21].view(3, 7, 10).float()
    acts = scale.encode(x)
    assert (acts != 0).any()
    assert torch.equal(acts, topk.encode(x))
    assert torch.equal(scale.decode(acts), topk.decode(acts))
    # The compact path sums in another order than a dense product: what rounding may do is in
    # proportion to the terms of each sum, not to the sum, where these cancel.
    terms = acts.abs() @ topk.W_dec.abs() + topk.b_dec.abs()
    tolerance = 10 * torch.finfo(scale.dtype).eps * terms
    assert ((scale(x) - topk(x)).abs() <= tolerance).all()


@pytest.mark.parametrize("num_dead", [0, 1, 3, 40, 60])
def test_ScaleTrainingSAE_with_one_expert_trains_like_TopKTrainingSAE(num_dead: int):
    scale = scale_sae(
        **ONE_EXPERT, load_balance_coefficient=0.0, aux_loss_coefficient=1.0
    )
    assert scale.omega is not None
    scale.omega.data.zero_()
    topk = TopKTrainingSAE(TopKTrainingSAEConfig(**SHARED, dtype="float64"))
    assert not topk.load_state_dict(scale.state_dict(), strict=False).missing_keys
    step = step_input(X, torch.arange(60) < num_dead)
    ours, theirs = (sae.training_forward_pass(step) for sae in (scale, topk))
    for name in ("mse_loss", "auxiliary_reconstruction_loss"):
        torch.testing.assert_close(ours.losses[name], theirs.losses[name])
    assert (ours.losses["auxiliary_reconstruction_loss"] > 0) == (num_dead > 0)
    ours.loss.backward()
    theirs.loss.backward()
    for name, parameter in topk.named_parameters():
        torch.testing.assert_close(scale.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("gate", ["softmax", "uniform", "rescaled"])
@pytest.mark.parametrize("topk_over", ["activations", "gated_activations"])
def test_SwitchTrainingSAE_equals_ScaleTrainingSAE_with_one_expert_per_token(
    gate: str, topk_over: str
):
    shared: dict[str, Any] = {"gate": gate, "topk_over": topk_over}
    switch = switch_sae(**shared)
    scale = scale_sae(experts_per_token=1, feature_scaling=False, **shared)
    scale.load_state_dict(switch.state_dict())
    step = step_input(X, DEAD)
    ours, theirs = (sae.training_forward_pass(step) for sae in (switch, scale))
    acts = ours.feature_acts.to_dense()
    assert (acts != 0).any()
    got = (acts, ours.sae_out, ours.loss)
    want = (theirs.feature_acts.to_dense(), theirs.sae_out, theirs.loss)
    assert_close(got, want, atol=0)

"""Settings in which our SAEs equal SAELens's, or each other."""

from typing import Any

import pytest
import torch
from helpers import randomize, scale_sae, step_input, switch_sae
from sae_lens.saes.topk_sae import (
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)

from sae_lens_scale import ScaleSAE, ScaleSAEConfig, ScaleTrainingSAE

SHARED: dict[str, Any] = {"d_in": 10, "d_sae": 60, "k": 6}
ONE_EXPERT: dict[str, Any] = {
    "num_experts": 1,
    "experts_per_token": 1,
    "gate": "uniform",
}


def copy_parameters(source: torch.nn.Module, target: torch.nn.Module) -> None:
    parameters = dict(target.named_parameters())
    for name, parameter in source.named_parameters():
        if name in parameters:
            parameters[name].data.copy_(parameter.data)


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
    copy_parameters(topk, scale)
    x = torch.randn(3, 7, 10, generator=torch.Generator().manual_seed(1))
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
    copy_parameters(scale, topk)
    x = torch.randn(
        31, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    dead = torch.arange(60) < num_dead
    ours = scale.training_forward_pass(step_input(x, dead))
    theirs = topk.training_forward_pass(step_input(x, dead))
    for name in ("mse_loss", "auxiliary_reconstruction_loss"):
        torch.testing.assert_close(ours.losses[name], theirs.losses[name])
    assert (ours.losses["auxiliary_reconstruction_loss"] > 0) == (num_dead > 0)
    ours.loss.backward()
    theirs.loss.backward()
    parameters = dict(scale.named_parameters())
    for name, parameter in topk.named_parameters():
        torch.testing.assert_close(parameters[name].grad, parameter.grad)


@pytest.mark.parametrize("gate", ["softmax", "uniform", "rescaled"])
@pytest.mark.parametrize("topk_over", ["activations", "gated_activations"])
def test_SwitchTrainingSAE_equals_ScaleTrainingSAE_with_one_expert_per_token(
    gate: str, topk_over: str
):
    switch = switch_sae(gate=gate, topk_over=topk_over)
    scale: ScaleTrainingSAE = scale_sae(
        experts_per_token=1, feature_scaling=False, gate=gate, topk_over=topk_over
    )
    copy_parameters(switch, scale)
    x = torch.randn(
        31, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    dead = torch.arange(60) % 2 == 0
    ours = switch.training_forward_pass(step_input(x, dead))
    theirs = scale.training_forward_pass(step_input(x, dead))
    assert (ours.feature_acts.to_dense() != 0).any()
    assert torch.equal(ours.feature_acts.to_dense(), theirs.feature_acts.to_dense())
    assert torch.equal(ours.sae_out, theirs.sae_out)
    assert torch.equal(ours.loss, theirs.loss)

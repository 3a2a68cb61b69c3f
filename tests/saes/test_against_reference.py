"""Every SAE against the oracle: outputs, losses and each parameter's gradient."""

from typing import Any

import pytest
import reference
import torch
from helpers import (
    DEAD,
    X,
    assert_close,
    assert_same_gradients,
    draw,
    gradients,
    reference_of,
    scale_sae,
    step_input,
    switch_sae,
)

from sae_lens_scale.saes.mixture.routing import GATES
from sae_lens_scale.saes.mixture.selection import SELECTIONS

TOPK_OVER = list(SELECTIONS)


def check_encode_decode(sae: Any, x: torch.Tensor) -> None:
    oracle, x = reference_of(sae), x.clone().requires_grad_()
    acts, want_acts = sae.encode(x), reference.encode(oracle, x)
    assert (want_acts != 0).any(), "a test of zeros proves nothing"
    assert_close(acts, want_acts)
    out, want_out = sae.decode(acts), reference.decode(oracle, want_acts)
    assert_close(out, want_out)
    weights = draw(*out.shape, seed=2)
    got, want = (out * weights).sum(), (want_out * weights).sum()
    assert_same_gradients(sae, got, want)
    assert_close(torch.autograd.grad(got, x), torch.autograd.grad(want, x))


def check_training(sae: Any, x: torch.Tensor, dead: torch.Tensor | None) -> None:
    oracle, cfg = reference_of(sae), sae.cfg
    output = sae.training_forward_pass(step_input(x, dead))
    assert_close(output.feature_acts.to_dense(), reference.encode(oracle, x))
    balance, revival = reference.load_balance_loss(oracle, x), x.new_zeros(())
    if dead is not None:
        latents = set(dead.nonzero().flatten().tolist())
        revival = reference.dead_latent_loss(oracle, x, latents)
    want = {
        "mse_loss": reference.mse_loss(oracle, x),
        "load_balance_loss": cfg.load_balance_coefficient * cfg.d_in * balance,
        "auxiliary_reconstruction_loss": cfg.aux_loss_coefficient * revival,
    }
    if cfg.multi_topk_coefficient:
        multi_topk = reference.multi_topk_loss(oracle, x)
        want["multi_topk_loss"] = cfg.multi_topk_coefficient * multi_topk
    assert_close(output.losses, want)
    total = torch.stack(list(want.values())).sum()
    assert_close(output.loss, total)
    assert_same_gradients(sae, output.loss, total)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("topk_over", TOPK_OVER)
@pytest.mark.parametrize("decomposition", ["mean", "identity", "learned", None])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_ScaleTrainingSAE_agrees_with_the_oracle(
    gate: str,
    topk_over: str,
    decomposition: str | None,
    rescale: bool,
    apply_b_dec: bool,
):
    sae = scale_sae(
        gate=gate,
        topk_over=topk_over,
        feature_scaling=decomposition is not None,
        decomposition=decomposition or "mean",
        rescale_acts_by_decoder_norm=rescale,
        apply_b_dec_to_input=apply_b_dec,
        load_balance_coefficient=0.3,
        aux_loss_coefficient=0.7,
    )
    check_encode_decode(sae, X)
    check_training(sae, X, DEAD)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("topk_over", TOPK_OVER)
@pytest.mark.parametrize("rescale", [True, False])
def test_SwitchTrainingSAE_agrees_with_the_oracle(
    gate: str, topk_over: str, rescale: bool
):
    sae = switch_sae(
        gate=gate, topk_over=topk_over, rescale_acts_by_decoder_norm=rescale
    )
    check_encode_decode(sae, X)
    check_training(sae, X, DEAD)


@pytest.mark.parametrize("shape", [(), (1,), (17,), (2, 7), (2, 3, 4)])
def test_ScaleTrainingSAE_agrees_with_the_oracle_for_inputs_of_any_shape(
    shape: tuple[int, ...],
):
    check_encode_decode(scale_sae(), draw(*shape, 10))


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_experts": 1, "experts_per_token": 1},
        {"num_experts": 5, "experts_per_token": 5},
        {"num_experts": 60, "experts_per_token": 3, "k": 2},
        {"k": 24},
        {"k": 1},
        {"d_in": 30},
        {"num_experts": 2, "experts_per_token": 1},
        {"experts_per_token": 3, "num_shared_experts": 1},
        {"experts_per_token": 3, "num_shared_experts": 2, "gate": "softmax"},
        {"experts_per_token": 5, "num_shared_experts": 3, "gate": "double_softmax"},
        {"k": 2, "multi_topk_coefficient": 0.6},
        {"k": 2, "multi_topk_coefficient": 0.6, "rescale_acts_by_decoder_norm": False},
        {"k": 2, "multi_topk_coefficient": 0.6, "apply_b_dec_to_input": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("decomposition", ["mean", "identity", "learned"])
def test_ScaleTrainingSAE_agrees_with_the_oracle_at_the_edges(
    overrides: dict[str, Any], decomposition: str
):
    sae = scale_sae(decomposition=decomposition, **overrides)
    x = draw(11, sae.cfg.d_in)
    check_encode_decode(sae, x)
    check_training(sae, x, DEAD)
    check_training(sae, x, dead=None)


@pytest.mark.parametrize("k", [1, 2, 5, 6, 12])
@pytest.mark.parametrize("topk_over", TOPK_OVER)
def test_the_MultiTopK_loss_is_that_of_four_times_as_many_latents(
    make: Any, k: int, topk_over: str, sparse: bool
):
    # Of 24 and 12 candidates: fewer than 4 k are left, or none.
    sae = make(
        k=k,
        topk_over=topk_over,
        use_sparse_activations=sparse,
        multi_topk_coefficient=0.6,
        gate="softmax",
    )
    check_training(sae, X, DEAD)
    check_training(sae, X[:1], dead=None)
    # A hook on pre-activations has all candidates computed.
    sae.hook_sae_acts_pre.add_hook(lambda acts, hook: acts)
    check_training(sae, X[:4], DEAD)


def test_ScaleTrainingSAE_agrees_with_the_oracle_sparse_or_dense(sparse: bool):
    sae = scale_sae(use_sparse_activations=sparse)
    check_training(sae, X, DEAD)
    output = sae.training_forward_pass(step_input(X))
    assert output.feature_acts.is_sparse == sparse


def test_an_expert_without_tokens_gets_no_gradient_and_the_loss_stays_finite():
    sae = scale_sae(load_balance_coefficient=0.0)
    # A column that no token of this batch can prefer.
    sae.b_router.data.zero_()
    x = draw(9, 10).abs()
    sae.W_router.data[:, 4] = -5.0
    assert not (sae.route(x).indices == 4).any()
    output = sae.training_forward_pass(step_input(x, torch.arange(60) >= 48))
    assert output.losses["auxiliary_reconstruction_loss"] == 0
    found = gradients(sae, output.loss)
    assert all(g.isfinite().all() for g in found.values())
    assert (found["W_enc"][:, 48:] == 0).all()
    assert (found["W_dec"][48:] == 0).all()
    assert (found["W_enc"][:, :48] != 0).any()


def test_ties_between_candidates_still_keep_exactly_k_equal_values():
    sae = scale_sae(gate="uniform", feature_scaling=False)
    # All latents of an expert are equal, so that every choice of k is a tie.
    for parameter, dim in ((sae.W_enc, 1), (sae.b_enc, 0), (sae.W_dec, 0)):
        experts = parameter.data.unflatten(dim, (5, 12))
        first = experts.narrow(dim + 1, 0, 1)
        parameter.data.copy_(first.expand_as(experts).flatten(dim, dim + 1))
    acts, want = sae.encode(X), reference.encode(reference_of(sae), X)
    assert (want != 0).any()
    # Any of the equals may survive: their number, values and reconstruction are the same.
    assert_close(acts.sort(dim=-1).values, want.sort(dim=-1).values)
    assert_close(sae.decode(acts), reference.decode(reference_of(sae), want))

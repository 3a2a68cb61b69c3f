"""Hook points: what they show, and what editing them does."""

import copy
from typing import Any

import pytest
import torch
from helpers import assert_close, scale_sae, step_input, switch_sae

from sae_lens_scale import ScaleSAE, ScaleSAEConfig

X = torch.randn(
    3, 7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
)


def inference_sae(**overrides: Any) -> ScaleSAE:
    settings: dict[str, Any] = {
        "d_in": 10,
        "d_sae": 60,
        "num_experts": 5,
        "experts_per_token": 2,
        "k": 6,
        "dtype": "float64",
    }
    sae = ScaleSAE(ScaleSAEConfig(**{**settings, **overrides}))
    source = dict(scale_sae().named_parameters())
    for name, parameter in sae.named_parameters():
        parameter.data.copy_(source[name].data)
    return sae


MAKERS = [
    pytest.param(inference_sae, id="scale"),
    pytest.param(scale_sae, id="scale-training"),
    pytest.param(switch_sae, id="switch-training"),
]


@pytest.mark.parametrize("make", MAKERS)
def test_cache_holds_every_hook_in_saelens_shapes(make: Any):
    sae = make()
    e = sae.cfg.experts_per_token
    out, cache = sae.run_with_cache(X)
    shapes = {name: tuple(value.shape) for name, value in cache.items()}
    assert shapes == {
        "hook_sae_input": (3, 7, 10),
        "hook_expert_weights": (3, 7, e),
        "hook_expert_indices": (3, 7, e),
        "hook_sae_acts_pre": (3, 7, 60),
        "hook_sae_acts_post": (3, 7, 60),
        "hook_sae_recons": (3, 7, 10),
        "hook_sae_output": (3, 7, 10),
    }
    routing = sae.route(X)
    assert torch.equal(cache["hook_expert_weights"], routing.weights)
    assert torch.equal(cache["hook_expert_indices"], routing.indices)
    assert torch.equal(cache["hook_sae_acts_post"], sae.encode(X))
    # Being watched changes nothing.
    assert_close(out, sae(X))


def test_hook_sae_acts_pre_shows_candidates_and_minus_infinity_elsewhere():
    sae = inference_sae()
    _, cache = sae.run_with_cache(X)
    pre = cache["hook_sae_acts_pre"].unflatten(-1, (5, 12))
    selected = torch.zeros(3, 7, 5, dtype=torch.bool)
    selected.scatter_(-1, cache["hook_expert_indices"], True)
    assert (pre[~selected] == -torch.inf).all()
    dense = ((X - sae.b_dec) @ sae.W_enc + sae.b_enc).unflatten(-1, (5, 12))
    assert_close(pre[selected], dense[selected])


@pytest.mark.parametrize("rescale", [True, False])
def test_editing_hook_sae_acts_pre_changes_what_topk_selects(rescale: bool):
    sae = inference_sae(rescale_acts_by_decoder_norm=rescale)
    latent = int(sae.route(X).indices[0, 0, 0]) * 12 + 4

    def boost(pre: torch.Tensor, hook: Any) -> torch.Tensor:
        pre[0, 0, latent] = 100.0
        return pre

    with sae.hooks(fwd_hooks=[("hook_sae_acts_pre", boost)]):
        acts = sae.encode(X)
    assert acts[0, 0].argmax() == latent
    assert acts[0, 0].count_nonzero() <= 6
    assert torch.equal(acts[1:], sae.encode(X)[1:])


@pytest.mark.parametrize("make", MAKERS)
def test_steering_a_latent_of_an_unselected_expert_moves_the_output(make: Any):
    sae = make(rescale_acts_by_decoder_norm=False)
    chosen = sae.route(X).indices[0, 0].tolist()
    expert = next(i for i in range(5) if i not in chosen)
    latent = expert * 12 + 3

    def steer(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        acts[..., latent] += 2.0
        return acts

    steered = sae.run_with_hooks(X, fwd_hooks=[("hook_sae_acts_post", steer)])
    torch.testing.assert_close(
        steered - sae(X), (2.0 * sae.W_dec[latent]).expand(3, 7, 10)
    )


def test_decode_is_linear_in_the_activations_whatever_was_encoded_before():
    sae = inference_sae()
    a, b = sae.encode(X), sae.encode(-X)
    sae.encode(X * 3)
    origin = sae.decode(torch.zeros_like(a))
    torch.testing.assert_close(origin, sae.b_dec.expand_as(X))
    torch.testing.assert_close(
        sae.decode(2 * a + 3 * b) - origin,
        2 * (sae.decode(a) - origin) + 3 * (sae.decode(b) - origin),
    )
    assert torch.equal(sae.decode(a.to_sparse()), sae.decode(a))


def test_ablating_an_expert_through_its_weight_removes_its_latents_only():
    sae = inference_sae(topk_over="activations")
    indices = sae.route(X).indices

    def ablate(weights: torch.Tensor, hook: Any) -> torch.Tensor:
        return weights.masked_fill(indices == 2, 0.0)

    with sae.hooks(fwd_hooks=[("hook_expert_weights", ablate)]):
        acts = sae.encode(X).unflatten(-1, (5, 12))
    clean = sae.encode(X).unflatten(-1, (5, 12))
    assert (clean[..., 2, :] != 0).any()
    assert (acts[..., 2, :] == 0).all()
    others = [0, 1, 3, 4]
    assert torch.equal(acts[..., others, :], clean[..., others, :])


def test_forcing_an_expert_through_its_index_runs_that_expert():
    sae = inference_sae()

    def force(indices: torch.Tensor, hook: Any) -> torch.Tensor:
        indices = indices.clone()
        indices[..., 0], indices[..., 1] = 4, 3
        return indices

    with sae.hooks(fwd_hooks=[("hook_expert_indices", force)]):
        acts = sae.encode(X).unflatten(-1, (5, 12))
    assert (acts[..., 4, :] != 0).any()
    assert (acts[..., :3, :] == 0).all()


@pytest.mark.parametrize("make", MAKERS)
def test_error_term_restores_the_input_and_keeps_interventions(make: Any):
    sae = make(rescale_acts_by_decoder_norm=False)
    sae._use_error_term = True
    torch.testing.assert_close(sae(X), X)

    def steer(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        acts[..., 7] += 1.0
        return acts

    steered = sae.run_with_hooks(X, fwd_hooks=[("hook_sae_acts_post", steer)])
    torch.testing.assert_close(steered - X, sae.W_dec[7].expand_as(X))


def test_a_hook_on_the_activations_acts_in_training_too():
    sae = scale_sae()
    x = X.flatten(0, 1)
    clean = sae.training_forward_pass(step_input(x))

    def zero(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        assert not acts.is_sparse
        return torch.zeros_like(acts)

    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", zero)]):
        edited = sae.training_forward_pass(step_input(x))
    torch.testing.assert_close(edited.sae_out, sae.b_dec.expand_as(x))
    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", lambda a, hook: a)]):
        watched = sae.training_forward_pass(step_input(x))
    torch.testing.assert_close(watched.sae_out, clean.sae_out)


@pytest.mark.parametrize("make", MAKERS[1:])
def test_backward_hooks_work_in_training(make: Any):
    sae = make()
    seen = []
    hook = ("hook_sae_acts_post", lambda grad, hook: seen.append(grad.shape))
    with sae.hooks(bwd_hooks=[hook]):
        sae.training_forward_pass(step_input(X.flatten(0, 1))).loss.backward()
    assert seen == [(21, 60)]


def test_calculate_aux_loss_leaves_a_pending_decode_undisturbed():
    sae = scale_sae(normalize_activations="layer_norm", aux_loss_coefficient=0.0)
    x = X.flatten(0, 1)
    want = sae(x)
    acts, pre = sae.encode_with_hidden_pre(x)
    sae.calculate_aux_loss(step_input(x * 5 + 1), acts, pre, x)
    torch.testing.assert_close(sae.decode(acts), want)


def test_gradients_reach_the_cache_backwards():
    sae = inference_sae()
    x = X.clone().requires_grad_()
    cache, forward, backward = sae.get_caching_hooks(incl_bwd=True)
    with sae.hooks(fwd_hooks=forward, bwd_hooks=backward):
        sae(x).sum().backward()
    assert x.grad is not None and (x.grad != 0).any()
    # d(sum of outputs) / d(activation) is the sum of the latent's decoder row.
    torch.testing.assert_close(
        cache["hook_sae_acts_post_grad"], sae.W_dec.sum(-1).expand(3, 7, 60)
    )


def test_route_leaves_a_pending_decode_undisturbed():
    sae = inference_sae(normalize_activations="layer_norm")
    want = sae(X)
    acts = sae.encode(X)
    sae.route(X * 5 + 1)
    torch.testing.assert_close(sae.decode(acts), want)
    sae.route(X)
    copy.deepcopy(sae)  # no activation is left on the SAE


@pytest.mark.parametrize("width", [1, 9, 11])
@pytest.mark.parametrize("method", ["encode", "route", "forward"])
def test_inputs_of_the_wrong_width_are_refused(width: int, method: str):
    sae = inference_sae()
    with pytest.raises(ValueError, match=rf"d_in=10, got shape \(3, {width}\)"):
        getattr(sae, method)(torch.zeros(3, width))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_token_yields_no_finite_output_and_spoils_no_other(bad: float):
    sae = inference_sae()
    x = X.clone()
    x[1, 2, 3] = bad
    out, clean = sae(x), sae(X)
    assert not out[1, 2].isfinite().any()
    out[1, 2] = clean[1, 2]
    torch.testing.assert_close(out, clean)


@pytest.mark.parametrize("make", MAKERS)
def test_an_empty_batch_yields_an_empty_output(make: Any):
    sae = make()
    assert sae.encode(X[:, :0]).shape == (3, 0, 60)
    assert sae(X[:, :0]).shape == (3, 0, 10)

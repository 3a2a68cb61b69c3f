"""Hook points: what they show, and what editing them does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    assert_close,
    assert_same_gradients,
    draw,
    inference,
    scale_sae,
    step_input,
)

from sae_lens_scale.saes.mixture.routing import GATES

X = draw(3, 7, 10, seed=1)
FLAT = X.flatten(0, 1)
# Without decoder norms, a change of an activation is that of its latent's decoder row.
UNSCALED = {"rescale_acts_by_decoder_norm": False}


def inference_sae(**overrides: Any) -> Any:
    return inference(scale_sae(feature_scaling=False, **overrides))


def give(value: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda *_, **__: value


def test_cache_holds_every_hook_in_saelens_shapes(make_either: Any):
    sae = make_either()
    e = sae.cfg.experts_per_token
    out, cache = sae.run_with_cache(X)
    assert {name: tuple(value.shape) for name, value in cache.items()} == {
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


@pytest.mark.parametrize("name", ["hook_sae_acts_pre", "hook_sae_acts_post"])
def test_a_forward_that_replaces_a_hook_points_own_sees_and_edits_like_a_hook(
    make_either: Any, name: str
):
    sae, seen = make_either(), []

    def edit(value: torch.Tensor, hook: Any = None) -> torch.Tensor:
        seen.append(value.clone())
        value[..., 0] = 3
        return value

    with sae.hooks(fwd_hooks=[(name, edit)]):
        want = sae(X)
    # As nnsight does, which registers no hook.
    getattr(sae, name).forward = edit
    got = sae(X)
    assert_close(got, want)
    assert_close(*seen)
    del getattr(sae, name).forward
    assert not torch.equal(got, sae(X))


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


def test_decode_is_linear_in_the_activations_whatever_was_encoded_before():
    sae = inference_sae()
    a, b = sae.encode(X), sae.encode(-X)
    sae.encode(X * 3)
    origin = sae.decode(torch.zeros_like(a))
    assert_close(origin, sae.b_dec.expand_as(X))
    assert_close(
        sae.decode(2 * a + 3 * b) - origin,
        2 * (sae.decode(a) - origin) + 3 * (sae.decode(b) - origin),
    )


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


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("hook", "value"), [("hook_expert_weights", 0.5), ("hook_expert_indices", 4)]
)
def test_edits_in_place_have_the_derivatives_of_others(
    make: Any, gate: str, hook: str, value: float
):
    def in_place(tensor: torch.Tensor, hook: Any) -> None:
        tensor[..., 0] = value

    def edited(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.cat(
            [torch.full_like(tensor[..., :1], value), tensor[..., 1:]], dim=-1
        )

    sae = make(gate=gate)
    losses = []
    for edit in (in_place, edited):
        with sae.hooks(fwd_hooks=[(hook, edit)]):
            losses.append(sae.training_forward_pass(step_input(FLAT)).loss)
    assert_close(*losses)
    assert_same_gradients(sae, *losses)


def test_forcing_an_expert_through_its_index_runs_that_expert():
    sae = inference_sae()
    forced = torch.tensor([4, 3]).expand(3, 7, 2)
    with sae.hooks(fwd_hooks=[("hook_expert_indices", give(forced))]):
        acts = sae.encode(X).unflatten(-1, (5, 12))
    assert (acts[..., 4, :] != 0).any()
    assert (acts[..., :3, :] == 0).all()


@pytest.mark.parametrize("use_error_term", [True, False])
def test_steering_a_latent_moves_the_output_by_its_decoder_row(
    make_either: Any, use_error_term: bool
):
    sae = make_either(**UNSCALED)
    sae._use_error_term = use_error_term
    chosen = sae.route(X).indices[0, 0].tolist()
    latent = next(i for i in range(5) if i not in chosen) * 12 + 3

    def steer(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        acts[..., latent] += 2.0
        return acts

    steered = sae.run_with_hooks(X, fwd_hooks=[("hook_sae_acts_post", steer)])
    clean = X if use_error_term else sae(X)
    assert_close(sae(X), clean)
    assert_close(steered - clean, (2.0 * sae.W_dec[latent]).expand(3, 7, 10))


def test_with_the_error_term_each_hook_fires_once_and_the_error_is_the_clean_one(
    make_either: Any,
):
    sae = make_either()
    with pytest.warns(DeprecationWarning, match="use_error_term"):
        sae.use_error_term = True
    fired: list[str] = []
    names = list(sae.hook_dict)
    sae.run_with_hooks(
        X, fwd_hooks=[(n, lambda value, hook: fired.append(hook.name)) for n in names]
    )
    assert sorted(fired) == sorted(names)
    _, clean = sae.run_with_cache(X)
    with sae.hooks([("hook_sae_acts_post", lambda a, hook: torch.full_like(a, 20.0))]):
        edited_out, edited = sae.run_with_cache(X)
    assert (edited["hook_sae_acts_post"] == 20).all()
    assert torch.equal(edited["hook_sae_error"], clean["hook_sae_error"])
    assert_close(edited["hook_sae_error"], X - sae.decode(sae.encode(X)))
    assert (edited_out - X).abs().max() > 1


def test_hooks_on_the_activations_act_in_training_too(make: Any):
    sae = make()
    clean = sae.training_forward_pass(step_input(FLAT))

    def zero(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        assert not acts.is_sparse
        return torch.zeros_like(acts)

    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", zero)]):
        edited = sae.training_forward_pass(step_input(FLAT))
    assert_close(edited.sae_out, sae.b_dec.expand_as(FLAT))
    seen = []
    watch = ("hook_sae_acts_post", lambda grad, hook: seen.append(grad.shape))
    with sae.hooks(bwd_hooks=[watch]):
        watched = sae.training_forward_pass(step_input(FLAT))
        watched.loss.backward()
    assert_close(watched.sae_out, clean.sae_out)
    assert seen == [(21, 60)]


def test_gradients_reach_the_cache_backwards():
    sae = inference_sae(**UNSCALED)
    x = X.clone().requires_grad_()
    cache, forward, backward = sae.get_caching_hooks(incl_bwd=True)
    with sae.hooks(fwd_hooks=forward, bwd_hooks=backward):
        sae(x).sum().backward()
    assert x.grad is not None and (x.grad != 0).any()
    # d(sum of outputs) / d(activation) is the sum of the latent's decoder row.
    assert_close(cache["hook_sae_acts_post_grad"], sae.W_dec.sum(-1).expand(3, 7, 60))


def test_route_and_calculate_aux_loss_leave_a_pending_decode_undisturbed():
    sae = scale_sae(normalize_activations="layer_norm", aux_loss_coefficient=0.0)
    want, other = sae(FLAT), FLAT * 5 + 1
    acts, pre = sae.encode_with_hidden_pre(FLAT)
    sae.route(other)
    assert_close(sae.decode(acts), want)
    acts, pre = sae.encode_with_hidden_pre(FLAT)
    sae.calculate_aux_loss(step_input(other), acts, pre, FLAT)
    assert_close(sae.decode(acts), want)
    sae.route(FLAT)
    assert not vars(sae).keys() & {"ln_mu", "ln_std"}, "activations stayed on the SAE"


EXPERTS = torch.zeros(3, 7, 2, dtype=torch.int64)


def spoil(indices: torch.Tensor, hook: Any) -> None:
    indices[2, 4, 1] = 17


@pytest.mark.parametrize(
    "method", ["encode", "forward", "route", "training_forward_pass"]
)
@pytest.mark.parametrize(
    ("hook", "edit", "message"),
    [
        ("indices", give(EXPERTS + 5), r"range\(num_experts=5\), got 5"),
        ("indices", give(EXPERTS - 1), r"range\(num_experts=5\), got -1"),
        # Counting tokens by expert would take 8 TB.
        ("indices", give(EXPERTS + 10**12), "got 1000000000000"),
        ("indices", spoil, "got 17"),
        ("indices", give(EXPERTS.float()), r"int64, got \(3, 7, 2\) and torch.float32"),
        ("indices", give(EXPERTS[..., :1]), r"shape \(3, 7, 2\) .*got \(3, 7, 1\)"),
        ("indices", give(EXPERTS[:1, :1]), r"shape \(3, 7, 2\) .*got \(1, 1, 2\)"),
        ("weights", give(torch.ones(3, 7, 1)), r"keep the shape \(3, 7, 2\), got"),
        ("weights", give(torch.ones(1, 7, 2)), r"keep the shape .* got \(1, 7, 2\)"),
        ("weights", give(torch.ones(3, 7, 3)), r"keep the shape .* got \(3, 7, 3\)"),
        ("weights", give(torch.ones(())), r"keep the shape .* got \(\)"),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_experts_and_weights_that_are_none_are_refused(
    method: str, hook: str, edit: Any, message: str
):
    sae: Any = scale_sae()
    x = step_input(X) if method == "training_forward_pass" else X
    with (
        sae.hooks([(f"hook_expert_{hook}", edit)]),
        pytest.raises(ValueError, match=f"hook_expert_{hook} must .*{message}"),
    ):
        getattr(sae, method)(x)


def test_an_expert_that_an_edit_selects_twice_counts_twice():
    # Ranked before the gate: two latents that are one have gates of their own.
    sae = scale_sae(topk_over="activations")
    once = scale_sae(topk_over="activations", experts_per_token=1, k=3, gate="uniform")
    experts = sae.route(FLAT).indices[:, :1]
    gates = torch.tensor([0.25, 0.5], dtype=torch.float64).expand(21, 2)
    edits: list[Any] = [
        ("hook_expert_indices", give(experts.expand(21, 2))),
        ("hook_expert_weights", give(gates)),
    ]
    with sae.hooks(edits), once.hooks([("hook_expert_indices", give(experts))]):
        acts, want = sae.encode(FLAT), 0.75 * once.encode(FLAT)
        step = sae.training_forward_pass(step_input(FLAT))
    assert_close(acts, want)
    assert_close(step.feature_acts.to_dense(), want)
    assert_close(step.sae_out, sae.decode(want))


@pytest.mark.parametrize("method", ["encode", "route", "forward"])
def test_inputs_of_the_wrong_width_are_refused_also_if_an_edit_makes_them_so(
    make: Any, method: str
):
    sae = make()
    for width in (1, 9, 11):
        with pytest.raises(ValueError, match=rf"d_in=10, got shape \(3, {width}\)"):
            getattr(sae, method)(torch.zeros(3, width))
    with (
        sae.hooks([("hook_sae_input", give(FLAT[:, :1]))]),
        pytest.raises(ValueError, match=r"d_in=10, got shape \(21, 1\)"),
    ):
        getattr(sae, method)(FLAT)


def test_a_closed_gate_hides_a_pre_activation_of_minus_infinity():
    sae = scale_sae(topk_over="activations", k=24)
    edits = [
        ("hook_expert_weights", lambda weights, hook: weights * 0),
        ("hook_sae_acts_pre", lambda pre, hook: torch.full_like(pre, -torch.inf)),
    ]
    assert torch.equal(sae.run_with_hooks(X, fwd_hooks=edits), sae.b_dec.expand_as(X))


@pytest.mark.parametrize("method", ["encode", "training_forward_pass"])
@pytest.mark.parametrize(
    "edit",
    [
        lambda pre: torch.cat([pre, pre]),
        lambda pre: pre.flatten(),
        lambda pre: pre.T,
        lambda pre: pre[:1],
        lambda pre: pre[:, ::2],
    ],
    ids=["rows twice", "flat", "transposed", "one row", "half"],
)
def test_pre_activations_of_another_shape_are_refused(
    make: Any, method: str, edit: Callable[[torch.Tensor], torch.Tensor]
):
    sae = make()
    x = step_input(FLAT) if method == "training_forward_pass" else FLAT
    with (
        sae.hooks([("hook_sae_acts_pre", lambda pre, hook: edit(pre))]),
        pytest.raises(
            ValueError, match=r"hook_sae_acts_pre must keep the shape \(21, 60\), got"
        ),
    ):
        getattr(sae, method)(x)

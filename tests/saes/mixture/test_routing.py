"""Routing against the oracle, and what the oracle does not cover."""

import pytest
import reference
import torch
from helpers import reference_of, scale_sae

from sae_lens_scale.saes.mixture.routing import (
    GATES,
    Routing,
    expert_load,
    load_balance_loss,
    route,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("gate", list(GATES))
@pytest.mark.parametrize(
    ("experts_per_token", "shared"), [(1, 0), (3, 0), (5, 0), (3, 1), (5, 3)]
)
def test_route_agrees_with_the_oracle(gate: str, experts_per_token: int, shared: int):
    sae = scale_sae(
        gate=gate, experts_per_token=experts_per_token, num_shared_experts=shared
    )
    oracle = reference_of(sae)
    x = draw(8, 10)
    routing = sae.route(x)
    for token, row in enumerate(x):
        p = reference.router_probabilities(oracle, row)
        indices, weights = reference.select_experts(oracle, p)
        assert routing.indices[token].tolist() == indices
        torch.testing.assert_close(routing.weights[token], torch.stack(weights))
        torch.testing.assert_close(routing.probabilities[token], p)


def test_shared_experts_are_selected_by_all_tokens_with_gate_one():
    sae = scale_sae(experts_per_token=4, num_shared_experts=2, gate="softmax")
    routing = sae.route(draw(50, 10))
    assert (routing.indices[:, :2] == torch.tensor([0, 1])).all()
    assert (routing.weights[:, :2] == 1).all()
    assert (routing.indices[:, 2:] >= 2).all()
    assert (routing.probabilities[:, :2] == 0).all()
    # They have no part in the balance, nor has the router's opinion of them.
    loss = balance(routing, 5, 2)
    load = expert_load(routing.indices[:, 2:], 5)[2:].double()
    want = 3 * (load * routing.probabilities.mean(0)[2:]).sum()
    torch.testing.assert_close(loss, want)
    (gradient,) = torch.autograd.grad(loss, sae.W_router)
    assert (gradient[:, :2] == 0).all()
    assert (gradient[:, 2:] != 0).all()


def test_rescaled_gates_average_one():
    routing = scale_sae(gate="rescaled", experts_per_token=3).route(draw(50, 10))
    torch.testing.assert_close(
        routing.weights.mean(-1), torch.ones(50, dtype=torch.float64)
    )


def test_gates_stay_finite_where_probabilities_underflow():
    W = torch.eye(4)
    x = torch.tensor([[1000.0, 1.0, 0.0, 3.0]])
    for gate in GATES:
        routing = route(x, W, torch.zeros(4), 3, gate)
        assert routing.weights.isfinite().all()
        # Ranked by logits: the probabilities of all but the first are 0 and tie.
        assert routing.indices.tolist() == [[0, 3, 1]]


def test_route_selects_in_float32_under_autocast_and_in_bfloat16():
    x, W = draw(500, 16).float(), draw(16, 8, seed=1).float()
    want = route(x, W, torch.zeros(16), 2, "rescaled")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = route(x, W, torch.zeros(16), 2, "rescaled")
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.weights, want.weights)
    # bfloat16 weights and inputs: rounded themselves, but nothing is after that.
    x, W = x.bfloat16(), W.bfloat16()
    want = route(x.float(), W.float(), torch.zeros(16), 2, "rescaled")
    got = route(x, W, torch.zeros(16).bfloat16(), 2, "rescaled")
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.weights, want.weights)


def balance(routing: Routing, num_experts: int, num_shared: int = 0) -> torch.Tensor:
    p = routing.probabilities.mean(0)[num_shared:]
    load = expert_load(routing.indices, num_experts, num_shared, p.dtype)
    return load_balance_loss(load, p)


def test_load_balance_loss_is_one_for_a_uniform_router_and_N_for_a_collapsed_one():
    uniform = Routing(
        torch.ones(8, 1), torch.arange(8).unsqueeze(1) % 4, torch.full((8, 4), 0.25)
    )
    assert balance(uniform, 4).item() == pytest.approx(1.0)
    p = torch.zeros(8, 4)
    p[:, 2] = 1
    collapsed = Routing(torch.ones(8, 1), torch.full((8, 1), 2), p)
    assert balance(collapsed, 4).item() == pytest.approx(4.0)


def test_load_balance_loss_lowers_the_probability_of_a_busy_expert():
    W = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    x = draw(64, 4).abs()
    with torch.no_grad():
        W[:, 1] = 0.5
    loss = balance(route(x, W, torch.zeros(4, dtype=torch.float64), 1, "softmax"), 3)
    (gradient,) = torch.autograd.grad(loss, W)
    assert (gradient[:, 1] > 0).all()
    assert (gradient[:, [0, 2]] < 0).all()


def test_expert_load_counts_all_selected_experts():
    indices = torch.tensor([[0, 1], [0, 2], [0, 1]])
    assert expert_load(indices, 4).tolist() == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0])


def test_a_router_in_bfloat16_is_computed_in_float32():
    x, W_router, b_router = (
        tensor.bfloat16() for tensor in (draw(500, 10), draw(10, 5, seed=1), draw(10))
    )
    got = route(x, W_router, b_router, 2, "rescaled")
    want = route(x.float(), W_router.float(), b_router.float(), 2, "rescaled")
    assert got.weights.dtype == torch.float32
    assert torch.equal(got.indices, want.indices)
    # Products in bfloat16 would move some tokens to other experts.
    logits = (x - b_router) @ W_router
    assert not torch.equal(logits.topk(2).indices, want.indices)

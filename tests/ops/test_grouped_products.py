"""Ops on their own: each against a plain formula, in outputs and gradients."""

import pytest
import torch

from sae_lens_scale.ops import (
    SparseLatents,
    TopKOver,
    decode_dense,
    decoder_norm,
    grouped_decode,
    grouped_encode,
    select_topk,
)

D_IN, D_SAE = 6, 24


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def experts(tokens: int, num_experts: int, e: int, only: int | None = None):
    """Distinct experts for each token; from the first `only` experts, if given."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(tokens, only or num_experts, generator=generator)
    return scores.topk(e, dim=-1).indices


def assert_same(got: torch.Tensor, want: torch.Tensor, *inputs: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    weights = draw(*got.shape, seed=9)
    for ours, theirs in zip(
        torch.autograd.grad((got * weights).sum(), inputs, retain_graph=True),
        torch.autograd.grad((want * weights).sum(), inputs, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


# tokens, num_experts, experts_per_token, experts that are used at all
SHAPES = [
    (9, 4, 2, None),
    (9, 1, 1, None),
    (1, 4, 2, None),
    (9, 4, 4, None),
    (9, 8, 2, 3),
    (9, 24, 3, None),
    (0, 4, 2, None),
]


@pytest.mark.parametrize(("tokens", "num_experts", "e", "only"), SHAPES)
def test_grouped_encode_is_the_selected_part_of_the_dense_product(
    tokens: int, num_experts: int, e: int, only: int | None
):
    x, W = draw(tokens, D_IN).requires_grad_(), draw(D_IN, D_SAE, seed=1)
    W.requires_grad_()
    indices = experts(tokens, num_experts, e, only)
    got = grouped_encode(x, W, indices, num_experts)
    dense = (x @ W).view(tokens, num_experts, D_SAE // num_experts)
    want = (
        torch.stack([dense[:, :0].sum(1)] * e, 1)
        if not tokens
        else torch.stack([dense[t, indices[t]] for t in range(tokens)])
    )
    assert_same(got, want, x, W)
    with torch.no_grad():
        assert torch.equal(grouped_encode(x, W, indices, num_experts), got)


@pytest.mark.parametrize(("tokens", "num_experts", "e", "only"), SHAPES)
def test_grouped_decode_is_the_dense_decode_of_the_selected_experts(
    tokens: int, num_experts: int, e: int, only: int | None
):
    size = D_SAE // num_experts
    acts = draw(tokens, e, size).requires_grad_()
    W = draw(D_SAE, D_IN, seed=1).requires_grad_()
    indices = experts(tokens, num_experts, e, only)
    wide = acts.new_zeros(tokens, num_experts, size).scatter(
        1, indices.unsqueeze(-1).expand_as(acts), acts
    )
    got = grouped_decode(acts, W, indices, num_experts)
    assert_same(got, wide.flatten(1) @ W, acts, W)


@pytest.mark.parametrize("k", [1, 5, 12, 100])
@pytest.mark.parametrize("topk_over", ["activations", "gated_activations"])
@pytest.mark.parametrize("batch", [(), (1,), (0,), (9,), (2, 5)])
def test_select_topk_finds_the_largest_candidates_of_all_experts_together(
    k: int, topk_over: TopKOver, batch: tuple[int, ...]
):
    pre, gates = draw(*batch, 2, 6), draw(*batch, 2, seed=1).abs()
    positions = select_topk(pre, gates, k, topk_over)
    assert positions.shape == (*batch, min(k, 12))
    ranking = (pre if topk_over == "activations" else pre * gates[..., None]).flatten(
        -2
    )
    want = ranking.argsort(descending=True)[..., : min(k, 12)]
    assert torch.equal(positions.sort().values, want.sort().values)
    assert torch.equal(select_topk(pre, gates, k, topk_over, sorted=True), want)


def test_select_topk_of_equal_candidates_selects_no_candidate_twice():
    positions = select_topk(torch.ones(3, 2, 4), torch.ones(3, 2), 5, "activations")
    assert all(len(set(row)) == 5 for row in positions.tolist())


@pytest.mark.parametrize("batch", [(), (1,), (9,), (2, 5), (2, 3, 2)])
def test_SparseLatents_dense_and_sparse_forms_agree(batch: tuple[int, ...]):
    values = draw(*batch, 3)
    indices = torch.rand(*batch, D_SAE).topk(3, dim=-1).indices
    latents = SparseLatents(values, indices)
    dense = latents.to_dense(D_SAE)
    assert dense.shape == (*batch, D_SAE)
    torch.testing.assert_close(dense.gather(-1, indices), values)
    assert dense.count_nonzero() == values.numel()
    assert torch.equal(latents.to_coo(D_SAE).to_dense(), dense)


@pytest.mark.parametrize("active", [0, 1, D_SAE])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_decode_dense_is_the_dense_product_however_few_are_active(
    tokens: int, active: int
):
    acts = draw(tokens, D_SAE)
    acts[:, active:] = 0
    W = draw(D_SAE, D_IN, seed=1).requires_grad_()
    acts.requires_grad_()
    assert_same(decode_dense(acts, W), acts @ W, acts, W)


def test_decode_dense_of_steered_activations():
    acts, W = torch.zeros(9, D_SAE), draw(D_SAE, D_IN).float()
    acts[3, 5], acts[4, 6], acts[5, 7] = -2, torch.inf, torch.nan
    torch.testing.assert_close(decode_dense(acts, W), acts @ W, equal_nan=True)
    with pytest.raises(RuntimeError, match="same dtype"):
        decode_dense(acts.double(), W)


def test_decoder_norm_has_a_floor_and_a_finite_gradient():
    W = draw(4, D_IN)
    W[2] = 0
    W.requires_grad_()
    norms = decoder_norm(W)
    assert norms[2] == 1e-8
    torch.testing.assert_close(norms[0], W[0].pow(2).sum().sqrt())
    (gradient,) = torch.autograd.grad(norms.sum(), W)
    assert gradient.isfinite().all()

"""Sparse products against their formulas, in all derivatives."""

from functools import partial
from typing import Any

import pytest
import reference
import torch
from helpers import assert_same_derivatives, draw

from sae_lens_scale.ops import (
    BufferPool,
    SparsityPattern,
    encoder_products,
    latent_sums,
    sampled_products,
    sparse_decode,
    torch_backend,
    transposed_latent_sums,
)

NUM_LATENTS, WIDTH = 12, 5


def select(
    tokens: int, k: int, popular: bool = False, ragged: bool = False
) -> SparsityPattern:
    """
    Latents with repetitions, within tokens too; all of the last four, if popular; if ragged,
    every third place is none.
    """
    low = NUM_LATENTS - 4 if popular else 0
    generator = torch.Generator().manual_seed(tokens + k)
    indices = torch.randint(low, NUM_LATENTS, (tokens, k), generator=generator)
    if ragged:
        indices.view(-1)[::3] = NUM_LATENTS
    return SparsityPattern(indices, NUM_LATENTS, ragged=ragged)


def factors(pattern: SparsityPattern) -> tuple[torch.Tensor, ...]:
    """Values, rows and weights that go with a pattern."""
    tokens, k = pattern.indices.shape
    shapes = ((tokens, k), (tokens, WIDTH), (NUM_LATENTS, WIDTH))
    drawn = (draw(*shape, seed=i) for i, shape in enumerate(shapes))
    return tuple(tensor.requires_grad_() for tensor in drawn)


@pytest.mark.parametrize(
    "pattern",
    [
        select(7, 3),
        select(7, 3).sorted(),
        select(7, 3)._replace(pool=BufferPool()),
        select(1, 4),
        select(9, 1),
        select(40, 6, popular=True),
        select(0, 3),
        select(4, 0),
        select(7, 4, ragged=True),
        select(7, 4, ragged=True).sorted(),
        select(9, 1, ragged=True),
        select(1, 1, ragged=True),
        select(0, 3, ragged=True),
    ],
    ids=lambda pattern: f"{tuple(pattern.indices.shape)}-{pattern.ragged}",
)
def test_products_are_their_formulas(pattern: SparsityPattern):
    indices = pattern.indices
    values, rows, weights = factors(pattern)
    by_column = weights.T.contiguous().T
    there = indices < NUM_LATENTS
    indices = indices.where(there, 0)
    # Products with a latent that is none are none, whatever their factor.
    kept = values * there
    for product, formula, first, counted in (
        (sparse_decode, reference.decode_selected, values, kept),
        (sampled_products, reference.sample_products, rows, rows),
    ):
        want = formula(counted, weights, indices)
        if product is sampled_products:
            want = want * there
        assert_same_derivatives(product(first, weights, pattern), want, first, weights)
        torch.testing.assert_close(product(first, by_column, pattern), want)
    want = reference.sum_by_latent(kept, rows, indices, NUM_LATENTS)
    assert_same_derivatives(latent_sums(values, rows, pattern), want, values, rows)
    got = transposed_latent_sums(values, rows, pattern)
    assert got.is_contiguous()
    assert_same_derivatives(got, want.T, values, rows)


def test_decoding_of_ragged_patterns_needs_no_sizes_of_the_data(
    monkeypatch: pytest.MonkeyPatch,
):
    pattern = select(7, 4, ragged=True)
    values, _, weights = factors(pattern)
    there = pattern.indices < NUM_LATENTS
    # As on GPUs.
    monkeypatch.setattr(torch_backend, "_may_compact", lambda _: False)
    want = reference.decode_selected(
        values * there, weights, pattern.indices.where(there, 0)
    )
    got = sparse_decode(values, weights, pattern)
    assert_same_derivatives(got, want, values, weights)


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("num_experts", [1, 3, 12])
def test_encoder_products_are_products_with_selected_latents_and_means(
    tokens: int, num_experts: int
):
    inputs = (draw(tokens, WIDTH), draw(WIDTH, seed=1), draw(WIDTH, 12, seed=2))
    x, b_dec, W_enc = (tensor.requires_grad_() for tensor in inputs)
    latents = select(tokens, 3)
    chosen = torch.rand(tokens, num_experts).topk(1, dim=-1).indices
    experts = SparsityPattern(chosen, num_experts)
    dense = (x - b_dec) @ W_enc
    want = dense.gather(-1, latents.indices)
    want_means = dense.unflatten(-1, (num_experts, -1)).mean(-1).gather(-1, chosen)
    got, means = encoder_products(
        x, b_dec, W_enc, want.detach(), want_means.detach(), latents, experts
    )
    assert means is not None
    assert_same_derivatives(got, want, *inputs)
    assert_same_derivatives(means, want_means, *inputs)
    assert_same_derivatives(got + means, want + want_means, *inputs)
    got, means = encoder_products(
        x, b_dec, W_enc, want.detach(), None, latents, experts
    )
    assert means is None
    assert_same_derivatives(got, want, *inputs)


LATENTS = select(7, 3)
VALUES, ROWS, WEIGHTS = (tensor.detach() for tensor in factors(LATENTS))


def encoder_products_from_nothing(
    x: torch.Tensor, b_dec: torch.Tensor, W_enc: torch.Tensor
) -> torch.Tensor:
    experts = SparsityPattern(torch.tensor([[0, 2]] * 7), 3)
    known, means = torch.zeros(7, 3).double(), torch.zeros(7, 2).double()
    products, means = encoder_products(x, b_dec, W_enc, known, means, LATENTS, experts)
    assert means is not None
    return torch.cat([products, means], dim=-1)


@pytest.mark.parametrize(
    ("product", "inputs"),
    [
        (partial(sparse_decode, latents=LATENTS), (VALUES, WEIGHTS)),
        (partial(sampled_products, latents=LATENTS), (ROWS, WEIGHTS)),
        (partial(latent_sums, latents=LATENTS), (VALUES, ROWS)),
        (partial(transposed_latent_sums, latents=LATENTS), (VALUES, ROWS)),
        (encoder_products_from_nothing, (ROWS, draw(WIDTH, seed=1), WEIGHTS.T)),
    ],
)
def test_forward_mode_and_vectorised_derivatives_agree(
    product: Any, inputs: tuple[torch.Tensor, ...]
):
    argnums = tuple(range(len(inputs)))
    reverse = torch.func.jacrev(product, argnums)(*inputs)
    torch.testing.assert_close(torch.func.jacfwd(product, argnums)(*inputs), reverse)
    assert all(jacobian.abs().max() > 0.1 for jacobian in reverse)


def test_results_do_not_depend_on_how_work_is_cut(monkeypatch: pytest.MonkeyPatch):
    pattern = select(40, 6).sorted()
    values, rows, weights = factors(pattern)
    whole = latent_sums(values, rows, pattern)
    sampled = sampled_products(rows.half(), weights.half(), pattern)
    monkeypatch.setattr(torch_backend, "_CHUNK_BYTES", 3 * WIDTH * 8)
    assert torch.equal(latent_sums(values, rows, pattern), whole)
    assert torch.equal(sampled_products(rows.half(), weights.half(), pattern), sampled)

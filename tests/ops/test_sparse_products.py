"""Sparse products against their formulas, in all derivatives."""

import pytest
import reference
import torch

from sae_lens_scale.ops import (
    BufferPool,
    SparsityPattern,
    encoder_products,
    grouped_encode,
    latent_sums,
    sampled_products,
    sparse_decode,
    transposed_latent_sums,
)
from sae_lens_scale.ops import torch_backend as kernels

NUM_LATENTS, WIDTH = 12, 5


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return values.requires_grad_()


def select(tokens: int, k: int, popular: bool = False) -> SparsityPattern:
    """Latents with repetitions, within tokens too; all of the last four, if popular."""
    low = NUM_LATENTS - 4 if popular else 0
    generator = torch.Generator().manual_seed(tokens + k)
    indices = torch.randint(low, NUM_LATENTS, (tokens, k), generator=generator)
    return SparsityPattern(indices, NUM_LATENTS)


PATTERNS = [
    select(7, 3),
    select(7, 3).sorted(),
    select(7, 3)._replace(pool=BufferPool()),
    select(1, 4),
    select(9, 1),
    select(40, 6, popular=True),
    select(0, 3),
    select(4, 0),
]
PRODUCTS = [sparse_decode, sampled_products, latent_sums, transposed_latent_sums]
every_pattern = pytest.mark.parametrize(
    "pattern", PATTERNS, ids=lambda s: f"{tuple(s.indices.shape)}"
)


def assert_same(
    got: torch.Tensor, want: torch.Tensor, *inputs: torch.Tensor, order: int = 2
) -> None:
    """Same values, and same derivatives up to ``order``."""
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    if not order or not want.requires_grad:
        return
    weights = draw(*got.shape, seed=9 + order).detach()
    ours, theirs = (
        torch.autograd.grad(
            (result * weights).pow(2).sum(),
            inputs,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for result in (got, want)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b, *inputs, order=order - 1)


@every_pattern
def test_sparse_decode_is_its_formula(pattern: SparsityPattern):
    values, weights = draw(*pattern.indices.shape), draw(NUM_LATENTS, WIDTH, seed=1)
    got = sparse_decode(values, weights, pattern)
    want = reference.decode_selected(values, weights, pattern.indices)
    assert_same(got, want, values, weights)


@every_pattern
def test_sampled_products_are_their_formula(pattern: SparsityPattern):
    rows, weights = (
        draw(len(pattern.indices), WIDTH),
        draw(NUM_LATENTS, WIDTH, seed=1),
    )
    got = sampled_products(rows, weights, pattern)
    want = reference.sample_products(rows, weights, pattern.indices)
    assert_same(got, want, rows, weights)


@every_pattern
def test_latent_sums_are_their_formula(pattern: SparsityPattern):
    values = draw(*pattern.indices.shape)
    rows = draw(len(pattern.indices), WIDTH, seed=1)
    got = latent_sums(values, rows, pattern)
    want = reference.sum_by_latent(values, rows, pattern.indices, NUM_LATENTS)
    assert_same(got, want, values, rows)
    got = transposed_latent_sums(values, rows, pattern)
    assert got.is_contiguous()
    assert_same(got, want.T, values, rows)


@pytest.mark.parametrize("product", PRODUCTS)
def test_forward_mode_and_vectorised_derivatives_agree(product):
    pattern = select(7, 3)
    a = draw(7, WIDTH if product is sampled_products else 3).detach()
    b = draw(7 if product in PRODUCTS[2:] else NUM_LATENTS, WIDTH, seed=1).detach()
    forward = torch.func.jacfwd(product, argnums=(0, 1))(a, b, pattern)
    reverse = torch.func.jacrev(product, argnums=(0, 1))(a, b, pattern)
    for ours, theirs in zip(forward, reverse, strict=True):
        assert ours.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("num_experts", [1, 3, 12])
def test_encoder_products_are_products_with_selected_latents_and_means(
    tokens: int, num_experts: int
):
    x, b_dec = draw(tokens, WIDTH), draw(WIDTH, seed=1)
    W_enc = draw(WIDTH, NUM_LATENTS, seed=2)
    latents = select(tokens, 3)
    chosen = torch.rand(tokens, num_experts).topk(1, dim=-1).indices
    experts = SparsityPattern(chosen, num_experts)
    size = NUM_LATENTS // num_experts
    dense = (x - b_dec) @ W_enc
    want = dense.gather(-1, latents.indices)
    want_means = dense.unflatten(-1, (num_experts, size)).mean(-1).gather(-1, chosen)
    got, means = encoder_products(
        x, b_dec, W_enc, want.detach(), want_means.detach(), latents, experts
    )
    assert means is not None
    inputs = (x, b_dec, W_enc)
    assert_same(got, want, *inputs)
    assert_same(means, want_means, *inputs)
    assert_same(got + means, want + want_means, *inputs)
    got, means = encoder_products(
        x, b_dec, W_enc, want.detach(), None, latents, experts
    )
    assert means is None
    assert_same(got, want, *inputs)


def test_encoder_products_forward_and_reverse_derivatives_agree():
    x, b_dec, W_enc = draw(7, WIDTH), draw(WIDTH, seed=1), draw(WIDTH, 12, seed=2)
    latents, chosen = select(7, 3), torch.tensor([[0, 2]] * 7)

    def products(
        x: torch.Tensor, b_dec: torch.Tensor, W_enc: torch.Tensor
    ) -> torch.Tensor:
        known, means = torch.zeros(7, 3).double(), torch.zeros(7, 2).double()
        experts = SparsityPattern(chosen, 3)
        known, means = encoder_products(x, b_dec, W_enc, known, means, latents, experts)
        assert means is not None
        return torch.cat([known, means], dim=-1)

    inputs = tuple(t.detach() for t in (x, b_dec, W_enc))
    forward = torch.func.jacfwd(products, argnums=(0, 1, 2))(*inputs)
    reverse = torch.func.jacrev(products, argnums=(0, 1, 2))(*inputs)
    for ours, theirs in zip(forward, reverse, strict=True):
        assert ours.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_of_other_dtypes_keep_them(dtype: torch.dtype):
    pattern = select(7, 3)
    values, rows = draw(7, 3).detach(), draw(7, WIDTH, seed=1).detach()
    weights = draw(NUM_LATENTS, WIDTH, seed=2).detach()
    tolerance = 20 * torch.finfo(dtype).eps
    for product, a, b in (
        (sparse_decode, values, weights),
        (sampled_products, rows, weights),
        (latent_sums, values, rows),
    ):
        got = product(a.to(dtype), b.to(dtype), pattern)
        assert got.dtype == dtype
        want = product(a, b, pattern)
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


def test_products_with_weights_that_are_stored_transposed():
    pattern = select(7, 3)
    weights = draw(WIDTH, NUM_LATENTS).T
    values, rows = draw(7, 3, seed=1), draw(7, WIDTH, seed=2)
    got = sparse_decode(values, weights, pattern)
    torch.testing.assert_close(
        got, sparse_decode(values, weights.contiguous(), pattern)
    )
    got = sampled_products(rows, weights, pattern)
    torch.testing.assert_close(
        got, sampled_products(rows, weights.contiguous(), pattern)
    )


def test_results_do_not_depend_on_how_work_is_cut(monkeypatch: pytest.MonkeyPatch):
    pattern = select(40, 6).sorted()
    values, rows = draw(40, 6).detach(), draw(40, WIDTH, seed=1).detach()
    weights = draw(NUM_LATENTS, WIDTH, seed=2).detach().float()
    whole = latent_sums(values, rows, pattern)
    sampled = sampled_products(rows.half(), weights.half(), pattern)
    monkeypatch.setattr(kernels, "_CHUNK_BYTES", 3 * WIDTH * 8)
    assert torch.equal(latent_sums(values, rows, pattern), whole)
    assert torch.equal(sampled_products(rows.half(), weights.half(), pattern), sampled)


def test_grouped_encode_with_an_encoder_stored_latent_by_latent():
    x, W = draw(7, WIDTH), draw(NUM_LATENTS, WIDTH, seed=1)
    chosen = torch.rand(7, 3).topk(2, dim=-1).indices
    got = grouped_encode(x, W.T, chosen, 3)
    torch.testing.assert_close(got, grouped_encode(x, W.T.contiguous(), chosen, 3))

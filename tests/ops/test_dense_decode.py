"""Decoding of wide activations against the dense product."""

import pytest
import torch

from sae_lens_scale.ops import decode_dense, decoder_norm

D_IN, D_SAE = 6, 24


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_same(got: torch.Tensor, want: torch.Tensor, *inputs: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    weights = draw(*got.shape, seed=9)
    for ours, theirs in zip(
        torch.autograd.grad((got * weights).sum(), inputs, retain_graph=True),
        torch.autograd.grad((want * weights).sum(), inputs, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


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
    assert decode_dense(acts.double(), W).dtype == torch.float64


def test_decoder_norm_has_a_floor_and_a_finite_gradient():
    W = draw(4, D_IN)
    W[2] = 0
    W.requires_grad_()
    norms = decoder_norm(W)
    assert norms[2] == 1e-8
    torch.testing.assert_close(norms[0], W[0].pow(2).sum().sqrt())
    (gradient,) = torch.autograd.grad(norms.sum(), W)
    assert gradient.isfinite().all()

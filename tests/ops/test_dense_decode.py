"""Decoding of wide activations against the dense product."""

import pytest
import torch
from helpers import assert_same_derivatives, draw

from sae_lens_scale.ops import decode_dense, decoder_norm


@pytest.mark.parametrize("active", [0, 1, 24])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_decode_dense_is_the_dense_product_however_few_are_active(
    tokens: int, active: int
):
    acts, W = draw(tokens, 24), draw(24, 6, seed=1).requires_grad_()
    acts[:, active:] = 0
    acts.requires_grad_()
    assert_same_derivatives(decode_dense(acts, W), acts @ W, acts, W)


def test_decode_dense_of_steered_activations():
    acts, W = torch.zeros(9, 24), draw(24, 6).float()
    acts[3, 5], acts[4, 6], acts[5, 7] = -2, torch.inf, torch.nan
    torch.testing.assert_close(decode_dense(acts, W), acts @ W, equal_nan=True)
    assert decode_dense(acts.double(), W).dtype == torch.float64


def test_decoder_norm_has_a_floor_and_a_finite_gradient():
    W = draw(4, 6)
    W[2] = 0
    norms = decoder_norm(W.requires_grad_())
    assert norms[2] == 1e-8
    torch.testing.assert_close(norms[0], W[0].pow(2).sum().sqrt())
    (gradient,) = torch.autograd.grad(norms.sum(), W)
    assert gradient.isfinite().all()

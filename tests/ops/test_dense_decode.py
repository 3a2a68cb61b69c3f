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


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_decoder_norm_has_a_floor_and_a_finite_gradient(dtype: torch.dtype):
    W = draw(4, 6).to(dtype)
    W[2] = 0
    norms = decoder_norm(W.requires_grad_())
    # The smallest number of float16 that has an inverse.
    floor = 2**-14 if dtype == torch.float16 else 1e-8
    torch.testing.assert_close(norms[2].item(), floor, rtol=1e-2, atol=0)
    assert (1 / norms).isfinite().all()
    torch.testing.assert_close(norms[0], W[0].double().norm().to(dtype))
    (gradient,) = torch.autograd.grad(norms.sum(), W)
    assert gradient.isfinite().all()

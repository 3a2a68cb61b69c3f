"""Feature scaling: the shortcut equals the scaled encoder, written out."""

import pytest
import reference
import torch

from sae_lens_scale.ops import grouped_encode
from sae_lens_scale.saes.mixture.feature_scaling import (
    expert_scaling,
    scaled_encoder,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("decomposition", ["mean", "identity", "learned"])
@pytest.mark.parametrize(("d_in", "num_experts"), [(5, 3), (20, 3), (5, 1), (5, 12)])
def test_scaled_encoder_is_the_papers_formula(
    decomposition: str, d_in: int, num_experts: int
):
    W, omega = draw(d_in, 12), draw(num_experts, seed=1)
    A = draw(d_in, d_in, seed=2) if decomposition == "learned" else None
    got = scaled_encoder(W, omega, decomposition, A)  # type: ignore[arg-type]
    for i, rows in enumerate(torch.arange(12).chunk(num_experts)):
        M = W[:, rows].T
        low = reference.low_pass(M, decomposition, A)  # type: ignore[arg-type]
        torch.testing.assert_close(got[:, rows].T, low + (1 + omega[i]) * (M - low))


def test_expert_scaling_equals_a_product_with_the_scaled_encoder():
    x, W, omega = draw(7, 5), draw(5, 12, seed=1), draw(3, seed=2)
    indices = torch.rand(7, 3).topk(2, dim=-1).indices
    products = grouped_encode(x, W, indices, 3)
    scaling = expert_scaling(omega, indices, products.mean(-1))
    want = grouped_encode(x, scaled_encoder(W, omega, "mean"), indices, 3)
    bias = draw(7, 2, 4, seed=4)
    torch.testing.assert_close(scaling.apply(products, bias), want + bias)
    slots = torch.tensor([[0, 1, 1]] * 7)
    some = [slice(None), [0, 1, 1], [3, 0, 2]]
    got = scaling.apply(products[some], bias[some], slots)
    torch.testing.assert_close(got, (want + bias)[some])


def test_a_small_omega_is_not_lost_in_bfloat16():
    omega = torch.full((1,), 0.003, dtype=torch.bfloat16)
    experts = torch.zeros(1, 1, dtype=torch.int64)
    scaling = expert_scaling(omega, experts, torch.zeros(1, 1, dtype=torch.bfloat16))
    torch.testing.assert_close(scaling.scale, 1 + omega.float().view(1, 1))
    products = torch.ones(1, 1, 2, dtype=torch.bfloat16)
    assert scaling.apply(products, products).dtype == torch.bfloat16


def test_omega_zero_changes_nothing():
    W = draw(5, 12)
    for decomposition in ("mean", "identity"):
        assert torch.equal(scaled_encoder(W, torch.zeros(3), decomposition), W)


def test_the_mean_of_an_expert_is_not_amplified():
    W = draw(5, 12)
    scaled = scaled_encoder(W, draw(3, seed=1), "mean")
    torch.testing.assert_close(scaled.view(5, 3, 4).mean(-1), W.view(5, 3, 4).mean(-1))

"""Grouped products against the dense product, in outputs and gradients."""

import pytest
import torch
from helpers import assert_same_derivatives, draw

from sae_lens_scale.ops import grouped_decode, grouped_encode, torch_backend

D_IN, D_SAE = 6, 24

# tokens, num_experts, experts_per_token, experts that are used at all
SHAPES = [
    (9, 4, 2, 4),
    (9, 1, 1, 1),
    (1, 4, 2, 4),
    (9, 4, 4, 4),
    (9, 8, 2, 3),
    (9, 24, 3, 24),
    (0, 4, 2, 4),
]


def experts(tokens: int, e: int, used: int) -> torch.Tensor:
    """Distinct experts for each token, from the first ``used``."""
    generator = torch.Generator().manual_seed(3)
    return torch.rand(tokens, used, generator=generator).topk(e, dim=-1).indices


@pytest.mark.parametrize(("tokens", "num_experts", "e", "used"), SHAPES)
def test_grouped_products_are_the_selected_part_of_dense_products(
    tokens: int, num_experts: int, e: int, used: int
):
    size = D_SAE // num_experts
    indices = experts(tokens, e, used)
    latents = indices.unsqueeze(-1).expand(-1, -1, size)

    x, W = draw(tokens, D_IN).requires_grad_(), draw(D_IN, D_SAE, seed=1)
    W.requires_grad_()
    got = grouped_encode(x, W, indices, num_experts)
    want = (x @ W).view(tokens, num_experts, size).gather(1, latents)
    assert_same_derivatives(got, want, x, W)
    with torch.no_grad():
        assert torch.equal(grouped_encode(x, W, indices, num_experts), got)
        by_latent = W.T.contiguous().T
        torch.testing.assert_close(
            grouped_encode(x, by_latent, indices, num_experts), got
        )

    acts, W = draw(tokens, e, size).requires_grad_(), draw(D_SAE, D_IN, seed=1)
    W.requires_grad_()
    wide = acts.new_zeros(tokens, num_experts, size).scatter(1, latents, acts)
    got = grouped_decode(acts, W, indices, num_experts)
    assert_same_derivatives(got, wide.flatten(1) @ W, acts, W)


@pytest.mark.skipif(
    not hasattr(torch.nn.functional, "grouped_mm"),
    reason="torch has no grouped product",
)
@pytest.mark.parametrize(("tokens", "num_experts", "e", "used"), SHAPES[:-1])
def test_torchs_own_grouped_product_gives_the_same(
    tokens: int,
    num_experts: int,
    e: int,
    used: int,
    monkeypatch: pytest.MonkeyPatch,
):
    # torch has none for float64, and wants rows at multiples of 16 bytes.
    shapes = [(tokens, 8), (8, 96), (96, 8)]
    parameters = [draw(*s, seed=i).float() for i, s in enumerate(shapes)]
    x, W_enc, W_dec = (parameter.requires_grad_() for parameter in parameters)
    indices = experts(tokens, e, used)

    def results() -> list[torch.Tensor]:
        acts = grouped_encode(x, W_enc, indices, num_experts).sin()
        recons = grouped_decode(acts, W_dec, indices, num_experts)
        return [recons, *torch.autograd.grad(recons.sin().sum(), parameters)]

    want, calls = results(), []
    grouped_mm = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch_backend, "has_grouped_kernel", lambda *_: True)
    monkeypatch.setattr(
        torch.nn.functional,
        "grouped_mm",
        lambda *args, **kwargs: calls.append(1) or grouped_mm(*args, **kwargs),
    )
    torch.testing.assert_close(results(), want, atol=1e-4, rtol=1e-4)
    assert len(calls) == 6, "two products and the two gradients of each"


def test_torchs_own_grouped_product_is_for_bfloat16_on_gpus():
    assert not torch_backend.has_grouped_kernel(draw(8, 8).bfloat16(), 8, 8)

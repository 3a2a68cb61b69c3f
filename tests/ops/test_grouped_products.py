"""Grouped products against the dense product, in outputs and gradients."""

import pytest
import torch

from sae_lens_scale.ops import grouped_decode, grouped_encode, torch_backend

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


@pytest.mark.skipif(
    not hasattr(torch.nn.functional, "grouped_mm"),
    reason="torch has no grouped product",
)
@pytest.mark.parametrize(("tokens", "num_experts", "e", "only"), SHAPES[:-1])
def test_torchs_own_grouped_product_gives_the_same(
    tokens: int,
    num_experts: int,
    e: int,
    only: int | None,
    monkeypatch: pytest.MonkeyPatch,
):
    # torch has none for float64, and wants rows at multiples of 16 bytes.
    shapes = [(tokens, 8), (8, 96), (96, 8)]
    parameters = [draw(*s, seed=i).float() for i, s in enumerate(shapes)]
    x, W_enc, W_dec = (parameter.requires_grad_() for parameter in parameters)
    indices = experts(tokens, num_experts, e, only)

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
    for got, expected in zip(results(), want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert len(calls) == 6, "two products and the two gradients of each"


def test_torchs_own_grouped_product_is_for_bfloat16_on_gpus():
    assert not torch_backend.has_grouped_kernel(draw(8, 8).bfloat16(), 8, 8)

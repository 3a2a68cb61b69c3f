"""Every autograd function under autocast and with factors of different dtypes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sae_lens_scale.ops import (
    BufferPool,
    SparseLatents,
    SparsityPattern,
    decode_dense,
    encoder_products,
    grouped_decode,
    grouped_encode,
    index_select,
    latent_sums,
    lookup,
    sampled_products,
    sparse_decode,
    transposed_latent_sums,
)

TOKENS, D_IN, D_SAE, N, E, K = 9, 8, 24, 4, 2, 3
SIZE = D_SAE // N
GENERATOR = torch.Generator().manual_seed(0)
LATENTS = SparsityPattern(
    torch.rand(TOKENS, D_SAE, generator=GENERATOR).topk(K).indices, D_SAE
)
EXPERTS = torch.rand(TOKENS, N, generator=GENERATOR).topk(E).indices
X, VALUES, ACTS = (TOKENS, D_IN), (TOKENS, K), (TOKENS, E, SIZE)
W_ENC, W_DEC = (D_IN, D_SAE), (D_SAE, D_IN)


def differentiable_products(x: torch.Tensor, W_enc: torch.Tensor) -> torch.Tensor:
    """Products as the encoder computes them: without a gradient, then with one."""
    b_dec = torch.linspace(-1, 1, D_IN).to(x.dtype)
    with torch.no_grad():
        known = grouped_encode(x - b_dec, W_enc, LATENTS.indices // SIZE, N)
        products = known.gather(-1, (LATENTS.indices % SIZE).unsqueeze(-1)).squeeze(-1)
        means = grouped_encode(x - b_dec, W_enc, EXPERTS, N).mean(-1)
    products, means = encoder_products(
        x, b_dec, W_enc, products, means, LATENTS, SparsityPattern(EXPERTS, N)
    )
    assert means is not None
    return products + means.sum(dim=1, keepdim=True)


def mostly_zero(acts: torch.Tensor, W_dec: torch.Tensor) -> torch.Tensor:
    keep = torch.arange(TOKENS * D_SAE).view(TOKENS, D_SAE) % 40 == 0
    return decode_dense(torch.where(keep, acts, 0), W_dec)


# Functions of two factors, and their shapes.
FUNCTIONS: dict[str, tuple[Callable[..., torch.Tensor], Any, Any]] = {
    "sparse_decode": (lambda v, w: sparse_decode(v, w, LATENTS), VALUES, W_DEC),
    "sampled_products": (lambda x, w: sampled_products(x, w, LATENTS), X, W_DEC),
    "latent_sums": (lambda v, x: latent_sums(v, x, LATENTS), VALUES, X),
    "transposed_latent_sums": (
        lambda v, x: transposed_latent_sums(v, x, LATENTS),
        VALUES,
        X,
    ),
    "grouped_encode": (lambda x, w: grouped_encode(x, w, EXPERTS, N), X, W_ENC),
    "grouped_decode": (lambda a, w: grouped_decode(a, w, EXPERTS, N), ACTS, W_DEC),
    "decode_dense": (decode_dense, (TOKENS, D_SAE), W_DEC),
    "decode_dense, mostly zero": (mostly_zero, (TOKENS, D_SAE), W_DEC),
    "encoder_products": (differentiable_products, X, W_ENC),
    "to_dense": (
        lambda v, w: SparseLatents(v, LATENTS.indices).to_dense(D_SAE) * w.T[:1],
        VALUES,
        W_DEC,
    ),
    "index_select and lookup": (
        lambda v, w: (
            v.sum(dim=0, keepdim=True).sum(dim=1, keepdim=True)
            * index_select(w, 0, torch.tensor([3, 5, 3]), BufferPool())
            * lookup(w, torch.tensor([1, 1, 2]))
        ),
        VALUES,
        W_DEC,
    ),
}
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
PRECISION = {F64: 1e-11, F32: 1e-4, F16: 2e-2, BF16: 1e-1}


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Representable in every dtype.
    numbers = torch.randn(shape, generator=generator).bfloat16().half()
    return numbers.to(dtype).requires_grad_()


def assert_as_precise_as(
    dtype: torch.dtype, got: torch.Tensor, want: torch.Tensor
) -> None:
    error = (got.double() - want).abs().max()
    assert error <= PRECISION[dtype] * want.abs().max(), f"{error}"


@pytest.mark.parametrize("name", list(FUNCTIONS))
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(
    "dtypes",
    [(a, b) for a in (F64, F32, F16, BF16) for b in (F64, F32, F16, BF16)],
    ids=lambda dtypes: "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
)
def test_results_have_the_wider_dtype_and_gradients_that_of_their_factor(
    name: str, autocast: bool, dtypes: tuple[torch.dtype, torch.dtype]
):
    function, *shapes = FUNCTIONS[name]
    factors = [draw(s, d, i) for i, (s, d) in enumerate(zip(shapes, dtypes))]
    exact = [factor.detach().double().requires_grad_() for factor in factors]
    wider = torch.promote_types(*dtypes)
    # The result is as precise as numbers of this dtype.
    least = BF16 if autocast else min(dtypes, key=lambda d: -PRECISION[d])
    with torch.autocast("cpu", dtype=BF16, enabled=autocast):
        result = function(*factors)
    assert result.dtype == wider
    want = function(*exact)
    assert_as_precise_as(least, result, want)
    weights = draw(result.shape, F64, 9).detach()
    gradients = torch.autograd.grad((result * weights).sum(), factors)
    expected = torch.autograd.grad((want * weights).sum(), exact)
    for gradient, factor, exactly in zip(gradients, factors, expected, strict=True):
        assert gradient.dtype == factor.dtype
        assert_as_precise_as(least, gradient, exactly)


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_a_backward_pass_may_run_under_autocast_too(name: str):
    function, *shapes = FUNCTIONS[name]
    factors = [draw(shape, F32, i) for i, shape in enumerate(shapes)]
    exact = [factor.detach().double().requires_grad_() for factor in factors]
    with torch.autocast("cpu", dtype=BF16):
        result = function(*factors)
        gradients = torch.autograd.grad(result.sum(), factors)
    expected = torch.autograd.grad(function(*exact).sum(), exact)
    for gradient, exactly in zip(gradients, expected, strict=True):
        assert_as_precise_as(BF16, gradient, exactly)

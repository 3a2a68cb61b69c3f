"""
The GPU kernels against the formulas.

They run on a GPU where there is one, else in Triton's interpreter. That accepts more than
Triton's compiler does, so they are also compiled for a GPU, which needs none.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from torch.testing import assert_close

if sys.platform != "linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sae_lens_scale.ops import SparsityPattern, triton_backend
from sae_lens_scale.ops.triton_backend import grouped, sparse

Run = Callable[..., Any]
Layout = Callable[[torch.Tensor], torch.Tensor]

TOLERANCES: dict[torch.dtype, dict[str, Any]] = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
    # One unit in the last place: the interpreter truncates.
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-3},
}
TYPE_NAMES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}


def _on_gpu(function: Callable[..., Any], *arguments: Any) -> Any:
    def copy(argument: Any) -> Any:
        if isinstance(argument, SparsityPattern):
            return argument._replace(indices=argument.indices.cuda())
        return argument.cuda()

    copies = [copy(argument) for argument in arguments]
    result = function(*copies)
    for argument, on_gpu in zip(arguments, copies, strict=True):
        if isinstance(argument, torch.Tensor):
            argument.copy_(on_gpu)
    return result.cpu() if isinstance(result, torch.Tensor) else result


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Calls a function of the module with CPU tensors, to which it may write."""
    if torch.cuda.is_available():
        yield _on_gpu
        return
    # Triton decides when it is imported whether to interpret, which has happened here. The
    # other process gets and returns tensors in memory that both share.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            yield lambda *call: process.submit(*call).result()


def as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, stored column by column."""
    return tensor.mT.contiguous().mT


def surrounded_by_nan(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, as the middle of a larger tensor."""
    return torch.nn.functional.pad(tensor, (1, 300) * tensor.ndim, value=torch.nan)[
        (slice(1, -300),) * tensor.ndim
    ]


LAYOUTS = [as_it_is, transposed, surrounded_by_nan]


def cases(
    sizes: list[Any], empty_sizes: list[Any], dtypes: list[torch.dtype]
) -> list[tuple[Any, torch.dtype, Layout]]:
    """All combinations; for what is empty, one."""
    return [
        *product(sizes, dtypes, LAYOUTS),
        *product(empty_sizes, dtypes[:1], LAYOUTS[:1]),
    ]


def random_numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def random_indices(tokens: int, k: int, num_latents: int) -> torch.Tensor:
    """Some latents twice; neither the first nor the last, where there are others."""
    unused = int(num_latents > 2)
    return torch.randint(unused, num_latents - unused, (k, tokens)).T


def random_weights(num_latents: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """NaN for the latents that :func:`random_indices` does not select."""
    weights = random_numbers(num_latents, width, dtype=dtype)
    if num_latents > 2:
        weights[[0, -1]] = torch.nan
    return weights


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    cases(
        # tokens, k, num_latents, width
        [(1, 1, 1, 1), (1, 9, 4, 300), (3, 1, 5, 257), (6, 17, 30, 20)],
        [(0, 4, 5, 8), (3, 0, 5, 8), (3, 4, 5, 0)],
        [torch.float32, torch.bfloat16, torch.float64],
    ),
)
def test_products_with_selected_latents_are_their_formulas(
    run: Run,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    layout: Layout,
):
    torch.manual_seed(0)
    tokens, k, num_latents, width = shape
    values = layout(random_numbers(tokens, k, dtype=dtype))
    rows = layout(random_numbers(tokens, width, dtype=dtype))
    weights = layout(random_weights(num_latents, width, dtype))
    indices = random_indices(tokens, k, num_latents)
    latents = SparsityPattern(indices, num_latents)
    expected = reference.sample_products(rows.double(), weights.double(), indices)
    out = run(triton_backend.sampled_products, rows, weights, latents)
    assert_close(out, expected.to(dtype), **TOLERANCES[dtype])
    check_latent_sums(run, values, rows, indices, num_latents)


def test_latents_that_are_none_have_no_products(run: Run):
    torch.manual_seed(0)
    values, rows = (random_numbers(6, n, dtype=torch.float32) for n in (5, 7))
    weights = random_weights(9, 7, torch.float32)
    indices = random_indices(6, 5, 9)
    there = torch.rand(6, 5) < 0.6
    latents = SparsityPattern(indices.where(there, 9), 9, ragged=True)
    out = run(triton_backend.sampled_products, rows, weights, latents)
    assert_close(out, reference.sample_products(rows, weights, indices) * there)
    sums = torch.full((9, 7), torch.nan)
    run(triton_backend.latent_sums, values, rows, latents, sums)
    kept = values * there
    assert_close(sums, reference.sum_by_latent(kept, rows, indices, 9))


def check_latent_sums(
    run: Run,
    values: torch.Tensor,
    rows: torch.Tensor,
    indices: torch.Tensor,
    num_latents: int,
):
    """Sums fill memory that held NaN, and write nothing beside it."""
    args = values.double(), rows.double(), indices, num_latents
    expected = reference.sum_by_latent(*args).to(rows.dtype)
    order = indices.flatten().argsort(stable=True).repeat_interleave(2)[::2]
    latents = SparsityPattern(indices, num_latents, order)
    memory = rows.new_full((num_latents, rows.shape[1] + 2), torch.nan)
    sums = memory[:, 1:-1]
    run(triton_backend.latent_sums, values, rows, latents, sums)
    assert_close(sums, expected, equal_nan=True, **TOLERANCES[rows.dtype])
    assert memory[:, [0, -1]].isnan().all()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(
    "counts",
    [
        [64],
        [16],
        [17, 1],
        [0, 17, 1, 16, 33, 0, 32, 15, 18, 0],
        [49, 47],
    ],
)
def test_latent_sums_add_up_the_tiles_of_popular_latents(
    run: Run, counts: list[int], k: int
):
    torch.manual_seed(0)
    latents = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    indices = latents[torch.randperm(len(latents))].view(-1, k)
    values = random_numbers(*indices.shape, dtype=torch.float32)
    rows = random_numbers(len(indices), 5, dtype=torch.float32)
    # Stays with the latents of its token.
    rows[0] = torch.inf
    check_latent_sums(run, values, rows, indices, len(counts))


def shuffled_experts(counts: list[int]) -> SparsityPattern:
    """Experts of tokens, two for each if they divide evenly; so many pairs of each expert."""
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    experts = experts[torch.randperm(len(experts))]
    e = 1 if len(experts) % 2 else 2
    # Not contiguous.
    indices = torch.stack([experts, experts], dim=1)[:, 0].view(-1, e)
    order = indices.flatten().argsort(stable=True).repeat_interleave(2)[::2]
    return SparsityPattern(indices, len(counts), order)


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    cases(
        # pairs of each expert, width of rows, width of products
        [
            ([4], 16, 16),
            ([2, 0, 66, 0, 1, 64, 129], 33, 20),
            ([0, 0, 3], 70, 130),
            ([0, 1], 1, 1),
        ],
        [([0, 0], 8, 8), ([2, 2], 0, 8), ([2, 2], 8, 0)],
        [torch.float32, torch.float16, torch.bfloat16],
    ),
)
def test_grouped_products_are_those_of_each_token_with_its_experts(
    run: Run,
    shape: tuple[list[int], int, int],
    dtype: torch.dtype,
    layout: Layout,
):
    torch.manual_seed(0)
    counts, width, n = shape
    experts = shuffled_experts(counts)
    tokens, e = experts.indices.shape
    rows = layout(random_numbers(tokens, width, dtype=dtype))
    acts = layout(random_numbers(tokens, e, n, dtype=dtype))
    matrices = layout(random_numbers(len(counts), width, n, dtype=dtype))
    of_pairs = matrices.double()[experts.indices]

    expected = torch.einsum("tw,tewn->ten", rows.double(), of_pairs)
    out = run(triton_backend.grouped_encode, rows, matrices, experts)
    assert_close(out, expected.to(dtype), **TOLERANCES[dtype])

    slots = torch.einsum("ten,tewn->tew", acts.double(), of_pairs)
    out = run(triton_backend.grouped_decode, acts, matrices, experts)
    # Each slot's product is rounded before they are added, and their sum may be small.
    rtol = TOLERANCES[dtype]["rtol"]
    atol = rtol * (1 + float(slots.abs().sum(dim=1).max()) if slots.numel() else 1)
    assert_close(out, slots.sum(dim=1).to(dtype), rtol=rtol, atol=atol)

    expected = matrices.new_zeros(matrices.shape, dtype=torch.float64)
    products = torch.einsum("tw,ten->tewn", rows.double(), acts.double())
    expected.index_add_(0, experts.indices.flatten(), products.flatten(0, 1))
    out = run(triton_backend.grouped_sums, rows, acts, experts)
    assert_close(out, expected.to(dtype), **TOLERANCES[dtype])


def test_tensors_of_different_dtypes_are_multiplied_in_the_wider_one(run: Run):
    torch.manual_seed(0)
    narrow = random_numbers(4, 8, dtype=torch.bfloat16)
    wide = random_numbers(2, 8, 6, dtype=torch.float32)
    indices = torch.tensor([[0, 3], [2, 1]])
    out = run(
        triton_backend.sampled_products,
        wide[:, :, 0],
        narrow,
        SparsityPattern(indices, 4),
    )
    expected = narrow.double()[indices] @ wide[:, :, 0].double().unsqueeze(-1)
    tolerance = TOLERANCES[torch.bfloat16]
    assert_close(out, expected.squeeze(-1).bfloat16(), **tolerance)
    experts = SparsityPattern(torch.tensor([[0], [1], [1], [0]]), 2).sorted()
    out = run(triton_backend.grouped_encode, narrow, wide, experts)
    expected = narrow.double().unsqueeze(1) @ wide.double()[experts.indices[:, 0]]
    assert_close(out, expected.bfloat16(), **tolerance)


def test_grouped_products_of_float64_are_refused():
    rows, matrices = torch.zeros(1, 2), torch.zeros(1, 2, 3)
    experts = SparsityPattern(torch.zeros(1, 1, dtype=torch.int64), 1).sorted()
    for factors in ((rows.double(), matrices), (rows, matrices.double())):
        with pytest.raises(ValueError, match=r"factors must .*got torch.float64"):
            triton_backend.grouped_encode(*factors, experts)
    acts = torch.zeros(1, 1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"factors must .*got torch.float64"):
        triton_backend.grouped_sums(rows, acts, experts)


def test_supported_is_what_the_kernels_compute_with(run: Run):
    assert run(triton_backend.supports, torch.zeros(1))
    assert not run(triton_backend.supports, torch.zeros(1, dtype=torch.float64))
    # Not interpreted here.
    assert not triton_backend.supports(torch.zeros(1))


Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def launches(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32
) -> list[Launch]:
    """Kernels and arguments of all launches of all functions, with nothing computed."""
    recorded: list[Launch] = []
    for module in (sparse, grouped):
        monkeypatch.setattr(
            module,
            "launch",
            lambda kernel, _, *args, **constants: recorded.append(
                (kernel, args, constants)
            ),
        )
    values, rows = torch.zeros(200, 3, dtype=dtype), torch.zeros(200, 64, dtype=dtype)
    weights = torch.zeros(9, 64, dtype=dtype)
    indices = torch.zeros(200, 3, dtype=torch.int64)
    latents = SparsityPattern(indices, len(weights)).sorted()
    triton_backend.sampled_products(rows, weights, latents)
    triton_backend.latent_sums(values, rows, latents, weights)
    experts = SparsityPattern(indices[:, :2], 3).sorted()
    matrices = weights.view(3, 64, 3)
    acts = triton_backend.grouped_encode(rows, matrices, experts)
    triton_backend.grouped_decode(acts, matrices, experts)
    triton_backend.grouped_sums(rows, acts, experts)
    return recorded


@pytest.mark.parametrize(
    ("dtype", "precision", "instruction"),
    [
        (torch.float32, "highest", "fma.rn.f32"),
        (torch.float32, "high", "tf32"),
        (torch.bfloat16, "highest", "bf16"),
    ],
)
def test_kernels_compile_for_a_gpu(
    dtype: torch.dtype,
    precision: str,
    instruction: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        recorded = launches(monkeypatch, dtype)
    finally:
        torch.set_float32_matmul_precision(before)
    products = []
    for kernel, args, constants in recorded:
        names = kernel.arg_names
        options = {"num_warps": constants.pop("num_warps", 4), "enable_fp_fusion": True}
        source = ASTSource(
            kernel,
            {
                name: TYPE_NAMES[arg.dtype] if isinstance(arg, torch.Tensor) else "i32"
                for name, arg in zip(names, args, strict=False)
            }
            | dict.fromkeys(constants, "constexpr"),
            {(names.index(name),): value for name, value in constants.items()},
        )
        compiled = triton.compile(
            source, target=GPUTarget("cuda", 80, 32), options=options
        )
        assert "cubin" in compiled.asm
        if "DOT" in constants:
            products.append(compiled.asm["ptx"])
    assert len(products) == 3
    for ptx in products:
        assert instruction in ptx
        assert ("tf32" in ptx) == (instruction == "tf32")

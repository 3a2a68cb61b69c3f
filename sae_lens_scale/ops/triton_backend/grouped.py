"""Products with the matrices of each token's experts, in tiles of one expert's pairs."""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int

from sae_lens_scale.ops.autograd import SparsityPattern

from .launch import DOT_DTYPES, INTERPRETED, launch

# Rows, columns and summands of the tiles that are multiplied, and warps, by bytes per
# number: sizes that compile without spilling registers, also in float32 without TF32.
_PRODUCT_TILES = {2: (64, 128, 64, 4), 4: (64, 128, 16, 8)}


@triton.jit
def _grouped_products_kernel(
    rows,
    row_indices,
    weights,
    order,
    starts,
    first_tiles,
    expert_of_tile,
    out,
    num_experts,
    width_in,
    width_out,
    rows_stride_r,
    rows_stride_i,
    weights_stride_e,
    weights_stride_i,
    weights_stride_o,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Neighbouring programs multiply the same rows, by the same expert's weights.
    column_blocks = (width_out + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // column_blocks
    expert = tl.load(expert_of_tile + tile)
    if expert >= num_experts:
        return
    number = tile - tl.load(first_tiles + expert)
    end = tl.load(starts + expert + 1)
    positions = tl.load(starts + expert) + number * BLOCK_M + tl.arange(0, BLOCK_M)
    in_expert = positions < end
    row = tl.load(row_indices + positions, in_expert, 0)
    columns = (tl.program_id(0) % column_blocks).to(tl.int64) * BLOCK_N + tl.arange(
        0, BLOCK_N
    )
    in_out = columns < width_out
    sums = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for first in range(0, width_in, BLOCK_K):
        i = first + tl.arange(0, BLOCK_K).to(tl.int64)
        in_in = i < width_in
        a = tl.load(
            rows + row[:, None] * rows_stride_r + i[None, :] * rows_stride_i,
            in_expert[:, None] & in_in[None, :],
            0.0,
        )
        b = tl.load(
            weights
            + expert * weights_stride_e
            + i[:, None] * weights_stride_i
            + columns[None, :] * weights_stride_o,
            in_in[:, None] & in_out[None, :],
            0.0,
        )
        sums = tl.dot(a.to(DOT), b.to(DOT), sums, input_precision=PRECISION)
    pairs = tl.load(order + positions, in_expert, 0)
    tl.store(
        out + pairs[:, None] * width_out + columns[None, :],
        sums.to(out.dtype.element_ty),
        in_expert[:, None] & in_out[None, :],
    )


def grouped_products(
    rows: Float[torch.Tensor, "num_rows width_in"],
    row_indices: Int[torch.Tensor, " pairs"],
    matrices: Float[torch.Tensor, "num_experts width_in width_out"],
    experts: SparsityPattern,
) -> Float[torch.Tensor, "pairs width_out"]:
    """
    Multiply rows by their experts' matrices: ``out[order[p]] = rows[row_indices[p]] @ matrices[e]``.

    float32 is multiplied as float32, unless torch's matrix products may use TF32
    (``torch.set_float32_matmul_precision``).

    Args:
        rows: Rows that the pairs' indices select from, ``[num_rows, width_in]``.
        row_indices: The row of each (token, slot) pair, in the order of ``experts``,
            ``[pairs]``.
        matrices: One matrix for each expert, ``[num_experts, width_in, width_out]``.
        experts: The experts of each token, and so each pair's (e).

    Returns:
        ``[pairs, width_out]``, in the dtype of rows, a product for each pair, unsorted.

    Raises:
        ValueError: If a factor is float64, which matrix units mostly lack.
    """
    dot = _dot_constants(rows, matrices)
    num_experts, width_in, width_out = matrices.shape
    order, starts = experts.find_order(), experts.starts()
    out = rows.new_empty(len(order), width_out)
    if not out.numel():
        return out
    # Tiles of an expert follow each other; how many there are is known to the GPU only, so
    # that those beyond the last, of no expert, have nothing to do.
    tiles = (starts.diff() + (dot["BLOCK_M"] - 1)) // dot["BLOCK_M"]
    first_tiles = torch.nn.functional.pad(tiles.cumsum(0), (1, 0))
    most = min(num_experts, len(order)) + len(order) // dot["BLOCK_M"]
    numbers = torch.arange(most, device=order.device)
    expert_of_tile = torch.searchsorted(first_tiles[1:], numbers, right=True)
    launch(
        _grouped_products_kernel,
        (most * triton.cdiv(width_out, dot["BLOCK_N"]),),
        rows,
        row_indices.contiguous(),
        matrices,
        order.contiguous(),
        starts,
        first_tiles,
        expert_of_tile,
        out,
        num_experts,
        width_in,
        width_out,
        *rows.stride(),
        *matrices.stride(),
        **dot,
    )
    return out


def grouped_encode(
    rows: torch.Tensor, matrices: torch.Tensor, experts: SparsityPattern
) -> torch.Tensor:
    """``rows @ matrices`` of each token's experts; ``[tokens, experts_per_token, n]``."""
    cast_rows, matrices = _as_autocast(rows, matrices)
    tokens = experts.find_order() // experts.indices.shape[-1]
    products = grouped_products(cast_rows, tokens, matrices, experts)
    return products.view(*experts.indices.shape, matrices.shape[-1]).to(rows.dtype)


def grouped_decode(
    acts: torch.Tensor, matrices: torch.Tensor, experts: SparsityPattern
) -> torch.Tensor:
    """``acts @ matrices.mT``, summed over each token's experts; ``[tokens, width]``."""
    flat, matrices = _as_autocast(acts.flatten(0, 1), matrices)
    products = grouped_products(flat, experts.find_order(), matrices.mT, experts)
    by_slot = products.to(acts.dtype).view(*experts.indices.shape, matrices.shape[1])
    return by_slot.sum(dim=1)


@triton.jit
def _grouped_sums_kernel(
    rows,
    acts,
    order,
    starts,
    out,
    experts_per_token,
    width,
    n,
    rows_stride_t,
    rows_stride_w,
    acts_stride_p,
    acts_stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(2).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(starts + expert + 1)
    sums = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for first in range(tl.load(starts + expert), end, BLOCK_K):
        positions = first + tl.arange(0, BLOCK_K)
        in_expert = positions < end
        pairs = tl.load(order + positions, in_expert, 0)
        tokens = pairs // experts_per_token
        a = tl.load(
            rows + tokens[None, :] * rows_stride_t + i[:, None] * rows_stride_w,
            in_expert[None, :] & (i < width)[:, None],
            0.0,
        )
        b = tl.load(
            acts + pairs[:, None] * acts_stride_p + j[None, :] * acts_stride_n,
            in_expert[:, None] & (j < n)[None, :],
            0.0,
        )
        sums = tl.dot(a.to(DOT), b.to(DOT), sums, input_precision=PRECISION)
    tl.store(
        out + (expert * width + i[:, None]) * n + j[None, :],
        sums.to(out.dtype.element_ty),
        (i < width)[:, None] & (j < n)[None, :],
    )


def grouped_sums(
    rows: torch.Tensor, acts: torch.Tensor, experts: SparsityPattern
) -> torch.Tensor:
    """``rows.T @ acts`` over the tokens of each expert; ``[num_experts, width, n]``."""
    cast_rows, flat = _as_autocast(rows, acts.flatten(0, 1))
    dot = _dot_constants(cast_rows, flat)
    width, n = rows.shape[-1], acts.shape[-1]
    out = rows.new_empty(experts.size, width, n)
    if out.numel():
        launch(
            _grouped_sums_kernel,
            (
                experts.size,
                triton.cdiv(width, dot["BLOCK_M"]),
                triton.cdiv(n, dot["BLOCK_N"]),
            ),
            cast_rows,
            flat,
            experts.find_order().contiguous(),
            experts.starts(),
            out,
            experts.indices.shape[-1],
            width,
            n,
            *cast_rows.stride(),
            *flat.stride(),
            **dot,
        )
    return out


def _as_autocast(*factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Factors in the dtype in which autocast multiplies them."""
    device = factors[0].device.type
    if not torch.is_autocast_enabled(device):
        return factors
    dtype = torch.get_autocast_dtype(device)
    return tuple(factor.to(dtype) for factor in factors)


def _dot_constants(a: torch.Tensor, b: torch.Tensor) -> dict[str, Any]:
    """Tiles, precision and warps of the products of two factors."""
    for factor in (a, b):
        if factor.dtype not in DOT_DTYPES:
            raise ValueError(
                f"factors must be float32, float16 or bfloat16, got {factor.dtype}"
            )
    dtype = torch.promote_types(a.dtype, b.dtype)
    block_m, block_n, block_k, warps = _PRODUCT_TILES[dtype.itemsize]
    if INTERPRETED:
        # The interpreter keeps bfloat16 as bits, which its tl.dot takes for integers.
        dtype = torch.float32
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "DOT": DOT_DTYPES[dtype],
        "PRECISION": "tf32" if _tf32_allowed() else "ieee",
        "num_warps": warps,
    }


def _tf32_allowed() -> bool:
    # Reading the older setting where the newer one is in use raises.
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if precision is None:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    return precision == "tf32"

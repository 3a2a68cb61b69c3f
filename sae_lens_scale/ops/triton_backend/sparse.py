"""Products over the selected latents: rows are gathered, a tile of them at a time."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float

from sae_lens_scale.ops.autograd import SparsityPattern

from .launch import launch

# Rows and columns of the tiles in which rows are gathered: enough loads in flight to hide
# their latency, few enough for registers.
_TILE_ROWS = 16
_TILE_COLUMNS = 128

_SUM_DTYPES = {
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def _sampled_products_kernel(
    rows,
    weights,
    indices,
    out,
    num_latents,
    k,
    width,
    rows_stride_t,
    rows_stride_w,
    weights_stride_j,
    weights_stride_w,
    indices_stride_t,
    indices_stride_k,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SUM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_k = i < k
    latents = tl.load(
        indices + token * indices_stride_t + i * indices_stride_k, in_k, 0
    )
    sums = tl.full((BLOCK_K, BLOCK_W), 0.0, SUM)
    for first in range(0, width, BLOCK_W):
        columns = first + tl.arange(0, BLOCK_W).to(tl.int64)
        in_width = columns < width
        row = tl.load(
            rows + token * rows_stride_t + columns * rows_stride_w, in_width, 0.0
        )
        selected = tl.load(
            weights
            + latents[:, None] * weights_stride_j
            + columns[None, :] * weights_stride_w,
            (in_k & (latents < num_latents))[:, None] & in_width[None, :],
            0.0,
        )
        sums += row.to(SUM)[None, :] * selected.to(SUM)
    result = tl.sum(sums, axis=1)
    tl.store(out + token * k + i, result.to(out.dtype.element_ty), in_k)


def sampled_products(
    rows: Float[torch.Tensor, "tokens width"],
    weights: Float[torch.Tensor, "num_latents width"],
    latents: SparsityPattern,
) -> Float[torch.Tensor, "tokens k"]:
    """``out[t, i] = rows[t] . weights[indices[t, i]]``, in the dtype of weights."""
    indices = latents.indices
    (tokens, k), width = indices.shape, weights.shape[1]
    out = weights.new_empty(tokens, k)
    if not out.numel():
        return out
    block_k, block_w = _gather_tile(k, width)
    launch(
        _sampled_products_kernel,
        (tokens, triton.cdiv(k, block_k)),
        rows,
        weights,
        indices,
        out,
        len(weights),
        k,
        width,
        *rows.stride(),
        *weights.stride(),
        *indices.stride(),
        BLOCK_K=block_k,
        BLOCK_W=block_w,
        SUM=_SUM_DTYPES[out.dtype],
    )
    return out


@triton.jit
def _latent_sums_kernel(
    values,
    rows,
    tokens,
    starts,
    out,
    width,
    rows_stride_t,
    rows_stride_w,
    out_stride_j,
    out_stride_w,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SUM: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
    in_width = columns < width
    end = tl.load(starts + latent + 1)
    sums = tl.full((BLOCK_P, BLOCK_W), 0.0, SUM)
    for first in range(tl.load(starts + latent), end, BLOCK_P):
        positions = first + tl.arange(0, BLOCK_P)
        is_latents = positions < end
        token = tl.load(tokens + positions, is_latents, 0)
        factors = tl.load(values + positions, is_latents, 0.0)
        summands = tl.load(
            rows + token[:, None] * rows_stride_t + columns[None, :] * rows_stride_w,
            is_latents[:, None] & in_width[None, :],
            0.0,
        )
        sums += factors.to(SUM)[:, None] * summands.to(SUM)
    result = tl.sum(sums, axis=0)
    tl.store(
        out + latent * out_stride_j + columns * out_stride_w,
        result.to(out.dtype.element_ty),
        in_width,
    )


def latent_sums(
    values: Float[torch.Tensor, "tokens k"],
    rows: Float[torch.Tensor, "tokens width"],
    latents: SparsityPattern,
    out: Float[torch.Tensor, "num_latents width"],
) -> None:
    """
    ``out[j] = sum of values[t, i] rows[t] over all indices[t, i] = j``.

    The (token, latent) pairs of a latent are neighbours once sorted, and are added by one
    program, a tile of rows at a time: no atomics, and no partial sums in memory.

    Args:
        values: Values of the selected latents, ``[tokens, k]``.
        rows: One row for each token, ``[tokens, width]``.
        latents: The latents of each token.
        out: Tensor that all sums are written to, ``[num_latents, width]``; its contents are
            ignored.
    """
    if not out.numel():
        return
    (num_latents, width), order = out.shape, latents.find_order()
    block_p, block_w = _gather_tile(len(order), width)
    launch(
        _latent_sums_kernel,
        (num_latents, triton.cdiv(width, block_w)),
        values.flatten()[order],
        rows,
        order // max(1, latents.indices.shape[1]),
        latents.starts(),
        out,
        width,
        *rows.stride(),
        *out.stride(),
        BLOCK_P=block_p,
        BLOCK_W=block_w,
        SUM=_SUM_DTYPES[out.dtype],
    )


def _gather_tile(num_rows: int, width: int) -> tuple[int, int]:
    return (
        min(_TILE_ROWS, triton.next_power_of_2(max(1, num_rows))),
        min(_TILE_COLUMNS, triton.next_power_of_2(max(1, width))),
    )

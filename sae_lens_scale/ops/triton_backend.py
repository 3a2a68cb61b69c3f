"""
GPU kernels for the products of mixture-of-experts SAEs, in Triton.

Nothing here knows autograd, and nothing waits for the GPU. Sums are formed in float32, or
float64 where the result is that, and in the same order each time. All tensors may have any
strides; rows that are contiguous are read fastest. Indices are int64 and not checked: one
that is out of range, but for the number of latents, which is no latent's, reads or writes
memory that is not the tensor's.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int

from . import torch_backend
from .autograd import SparsityPattern

# Rows and columns of the tiles in which rows are gathered: enough loads in flight to hide
# their latency, few enough for registers.
_TILE_ROWS = 8
_TILE_COLUMNS = 256
# Latents that many tokens selected are summed in pieces of this many pairs, so that they
# keep many programs busy, not one.
_PIECE = 128
# Pairs of one expert, outputs and inputs of the tiles that are multiplied, and warps, by
# bytes per number: sizes that compile without spilling registers, also in float32 without TF32.
_PRODUCT_TILES = {2: (64, 128, 64, 4), 4: (64, 128, 16, 8)}

_SUM_DTYPES = {
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
_DOT_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


def supports(tensor: torch.Tensor) -> bool:
    """
    Say whether these kernels compute with a tensor.

    They do with float32, float16 and bfloat16 on NVIDIA GPUs that Triton supports, those of
    compute capability 8.0 or more; with TRITON_INTERPRET=1, which had to be set before
    Triton was imported, on all devices.
    """
    if tensor.dtype not in _DOT_DTYPES:
        return False
    if _INTERPRETED:
        return True
    if tensor.device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(tensor.device) >= (8, 0)


# In all kernels, whatever is multiplied by a stride is int64: a million rows of width 4096
# have more numbers than int32.


@triton.jit
def _sparse_decode_kernel(
    values,
    weights,
    indices,
    out,
    num_latents,
    k,
    width,
    values_stride_t,
    values_stride_k,
    weights_stride_j,
    weights_stride_w,
    indices_stride_t,
    indices_stride_k,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SUM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
    in_width = columns < width
    sums = tl.full((BLOCK_K, BLOCK_W), 0.0, SUM)
    for first in range(0, k, BLOCK_K):
        i = first + tl.arange(0, BLOCK_K).to(tl.int64)
        in_k = i < k
        latents = tl.load(
            indices + token * indices_stride_t + i * indices_stride_k, in_k, 0
        )
        factors = tl.load(
            values + token * values_stride_t + i * values_stride_k, in_k, 0.0
        )
        rows = tl.load(
            weights
            + latents[:, None] * weights_stride_j
            + columns[None, :] * weights_stride_w,
            (in_k & (latents < num_latents))[:, None] & in_width[None, :],
            0.0,
        )
        sums += factors.to(SUM)[:, None] * rows.to(SUM)
    result = tl.sum(sums, axis=0)
    tl.store(out + token * width + columns, result.to(out.dtype.element_ty), in_width)


def sparse_decode(
    values: Float[torch.Tensor, "tokens k"],
    weights: Float[torch.Tensor, "num_latents width"],
    latents: SparsityPattern,
) -> Float[torch.Tensor, "tokens width"]:
    """``out[t] = sum_i values[t, i] weights[indices[t, i]]``, in the dtype of weights."""
    indices = latents.indices
    (tokens, k), width = indices.shape, weights.shape[1]
    out = weights.new_empty(tokens, width)
    if not out.numel():
        return out
    block_k, block_w = _gather_tile(k, width)
    _launch(
        _sparse_decode_kernel,
        (tokens, triton.cdiv(width, block_w)),
        values,
        weights,
        indices,
        out,
        len(weights),
        k,
        width,
        *values.stride(),
        *weights.stride(),
        *indices.stride(),
        BLOCK_K=block_k,
        BLOCK_W=block_w,
        SUM=_SUM_DTYPES[out.dtype],
    )
    return out


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
    _launch(
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
def _sum_pieces_kernel(
    values,
    rows,
    order,
    starts,
    first_pieces,
    latent_of_piece,
    partial_sums,
    long_latents,
    out,
    num_latents,
    k,
    width,
    values_stride_t,
    values_stride_k,
    rows_stride_t,
    rows_stride_w,
    out_stride_j,
    out_stride_w,
    PIECE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SUM: tl.constexpr,
):
    piece = tl.program_id(0)
    latent = tl.load(latent_of_piece + piece)
    if latent >= num_latents:
        return
    start = tl.load(starts + latent)
    end = tl.load(starts + latent + 1)
    number = piece - tl.load(first_pieces + latent)
    first = start + number * PIECE
    last = tl.minimum(first + PIECE, end)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
    in_width = columns < width
    sums = tl.full((BLOCK_P, BLOCK_W), 0.0, SUM)
    for position in range(first, last, BLOCK_P):
        positions = position + tl.arange(0, BLOCK_P)
        in_piece = positions < last
        pairs = tl.load(order + positions, in_piece, 0)
        tokens = pairs // k
        factors = tl.load(
            values + tokens * values_stride_t + (pairs - tokens * k) * values_stride_k,
            in_piece,
            0.0,
        )
        summands = tl.load(
            rows + tokens[:, None] * rows_stride_t + columns[None, :] * rows_stride_w,
            in_piece[:, None] & in_width[None, :],
            0.0,
        )
        sums += factors.to(SUM)[:, None] * summands.to(SUM)
    result = tl.sum(sums, axis=0)
    if end - start <= PIECE:
        tl.store(
            out + latent * out_stride_j + columns * out_stride_w,
            result.to(out.dtype.element_ty),
            in_width,
        )
    else:
        # Pieces of one latent start in successive spans of PIECE positions. One span can
        # hold the starts of two such pieces, one latent's last and another one's first.
        span = first // PIECE
        slot = 2 * span + (number == 0).to(tl.int64)
        tl.store(partial_sums + slot * width + columns, result, in_width)
        if number == 0:
            tl.store(long_latents + span, latent)


@triton.jit
def _sum_long_latents_kernel(
    starts,
    partial_sums,
    long_latents,
    out,
    width,
    out_stride_j,
    out_stride_w,
    PIECE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SUM: tl.constexpr,
):
    span = tl.program_id(0).to(tl.int64)
    latent = tl.load(long_latents + span)
    if latent < 0:
        return
    pairs = tl.load(starts + latent + 1) - tl.load(starts + latent)
    pieces = (pairs + PIECE - 1) // PIECE
    columns = tl.program_id(1).to(tl.int64) * BLOCK_W + tl.arange(0, BLOCK_W)
    in_width = columns < width
    sums = tl.full((BLOCK_P, BLOCK_W), 0.0, SUM)
    for first in range(0, pieces, BLOCK_P):
        numbers = first + tl.arange(0, BLOCK_P).to(tl.int64)
        slots = 2 * (span + numbers) + (numbers == 0).to(tl.int64)
        sums += tl.load(
            partial_sums + slots[:, None] * width + columns[None, :],
            (numbers < pieces)[:, None] & in_width[None, :],
            0.0,
        )
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

    No atomics: the pairs of a latent, neighbours once sorted, are cut into pieces of limited
    length, and those of latents that have several are added in a second step.

    Args:
        values: Values of the selected latents, ``[tokens, k]``.
        rows: One row for each token, ``[tokens, width]``.
        latents: The latents of each token.
        out: Tensor that all sums are written to, ``[num_latents, width]``; its contents are
            ignored.
    """
    out.zero_()
    indices, order = latents.indices, latents.find_order()
    (num_latents, width), k, pairs = out.shape, indices.shape[1], len(order)
    if not pairs or not out.numel():
        return
    starts, first_pieces, latent_of_piece = _pieces(
        indices.flatten()[order], num_latents, _PIECE
    )
    spans = triton.cdiv(pairs, _PIECE)
    sum_dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    partial_sums = out.new_empty((2 * spans, width), dtype=sum_dtype)
    long_latents = order.new_full((spans,), -1)
    block_p, block_w = _gather_tile(pairs, width)
    column_blocks = triton.cdiv(width, block_w)
    constants = {
        "PIECE": _PIECE,
        "BLOCK_P": block_p,
        "BLOCK_W": block_w,
        "SUM": _SUM_DTYPES[out.dtype],
    }
    _launch(
        _sum_pieces_kernel,
        (len(latent_of_piece), column_blocks),
        values,
        rows,
        order.contiguous(),
        starts,
        first_pieces,
        latent_of_piece,
        partial_sums,
        long_latents,
        out,
        num_latents,
        k,
        width,
        *values.stride(),
        *rows.stride(),
        *out.stride(),
        **constants,
    )
    if pairs > _PIECE:
        _launch(
            _sum_long_latents_kernel,
            (spans, column_blocks),
            starts,
            partial_sums,
            long_latents,
            out,
            width,
            *out.stride(),
            **constants,
        )


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
    weights: Float[torch.Tensor, "num_experts width_in width_out"],
    order: Int[torch.Tensor, " pairs"],
    experts: Int[torch.Tensor, " pairs"],
) -> Float[torch.Tensor, "pairs width_out"]:
    """
    Multiply rows by their experts' weights: ``out[order[p]] = rows[row_indices[p]] @ weights[experts[p]]``.

    float32 is multiplied as float32, unless torch's matrix products may use TF32
    (``torch.set_float32_matmul_precision``).

    Args:
        rows: Rows that the pairs' indices select from, ``[num_rows, width_in]``.
        row_indices: The row of each pair, sorted by expert, ``[pairs]``.
        weights: One matrix for each expert, ``[num_experts, width_in, width_out]``.
        order: Position of each pair's product in the result; all of ``range(pairs)``.
        experts: The expert of each pair, ascending, ``[pairs]``.

    Returns:
        ``[pairs, width_out]``, in the dtype of rows.

    Raises:
        ValueError: If rows or weights are float64, which matrix units mostly lack.
    """
    for name, tensor in (("rows", rows), ("weights", weights)):
        if tensor.dtype not in _DOT_DTYPES:
            raise ValueError(
                f"{name} must be float32, float16 or bfloat16, not {tensor.dtype}"
            )
    num_experts, width_in, width_out = weights.shape
    out = rows.new_empty(len(order), width_out)
    if not out.numel():
        return out
    dot_dtype = torch.promote_types(rows.dtype, weights.dtype)
    block_m, block_n, block_k, warps = _PRODUCT_TILES[dot_dtype.itemsize]
    starts, first_tiles, expert_of_tile = _pieces(experts, num_experts, block_m)
    if _INTERPRETED:
        # The interpreter keeps bfloat16 as bits, which its tl.dot takes for integers.
        dot_dtype = torch.float32
    _launch(
        _grouped_products_kernel,
        (len(expert_of_tile) * triton.cdiv(width_out, block_n),),
        rows,
        row_indices.contiguous(),
        weights,
        order.contiguous(),
        starts,
        first_tiles,
        expert_of_tile,
        out,
        num_experts,
        width_in,
        width_out,
        *rows.stride(),
        *weights.stride(),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        DOT=_DOT_DTYPES[dot_dtype],
        PRECISION="tf32" if _tf32_allowed() else "ieee",
        num_warps=warps,
    )
    return out


def grouped_encode(
    rows: torch.Tensor, matrices: torch.Tensor, experts: SparsityPattern
) -> torch.Tensor:
    """``rows @ matrices`` of each token's experts; ``[tokens, experts_per_token, n]``."""
    if torch_backend.has_grouped_kernel(rows, *matrices.shape[1:]):
        return torch_backend.grouped_encode(rows, matrices, experts)
    tokens = experts.find_order() // experts.indices.shape[-1]
    products = _grouped(rows, tokens, matrices, experts)
    return products.view(*experts.indices.shape, matrices.shape[-1])


def grouped_decode(
    acts: torch.Tensor, matrices: torch.Tensor, experts: SparsityPattern
) -> torch.Tensor:
    """``acts @ matrices.mT``, summed over each token's experts; ``[tokens, width]``."""
    if torch_backend.has_grouped_kernel(acts, *matrices.shape[1:]):
        return torch_backend.grouped_decode(acts, matrices, experts)
    flat = acts.flatten(0, 1)
    products = _grouped(flat, experts.find_order(), matrices.mT, experts)
    return products.view(*experts.indices.shape, matrices.shape[1]).sum(dim=1)


def _grouped(
    rows: torch.Tensor,
    row_indices: torch.Tensor,
    matrices: torch.Tensor,
    experts: SparsityPattern,
) -> torch.Tensor:
    """One product for each (token, slot) pair, in the dtype of rows under autocast too."""
    dtype, device = rows.dtype, rows.device.type
    if torch.is_autocast_enabled(device):
        rows = rows.to(torch.get_autocast_dtype(device))
        matrices = matrices.to(torch.get_autocast_dtype(device))
    order = experts.find_order()
    expert_of_pair = experts.indices.flatten()[order]
    out = grouped_products(rows, row_indices, matrices, order, expert_of_pair)
    return out.to(dtype)


_INTERPRETED = not isinstance(_sparse_decode_kernel, triton.JITFunction)


@torch.compiler.disable()
def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    # Triton launches on the current device, whatever the tensors' is.
    with torch.cuda.device_of(args[0]):
        # Fused as Triton does up to 3.9; what it does after has to be asked for.
        kernel[grid](*args, **constants, enable_fp_fusion=True)


def _gather_tile(num_rows: int, width: int) -> tuple[int, int]:
    return (
        min(_TILE_ROWS, triton.next_power_of_2(max(1, num_rows))),
        min(_TILE_COLUMNS, triton.next_power_of_2(max(1, width))),
    )


def _pieces(
    groups: torch.Tensor, num_groups: int, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Cut sorted groups into pieces of at most ``size`` positions, without waiting for the GPU.

    Args:
        groups: The group of each position, ascending.
        num_groups: Number of groups.
        size: Positions of a piece.

    Returns:
        The start of each group and, after the last, its end, ``[num_groups + 1]``; the
        first piece of each group, likewise; the group of each piece, ``num_groups`` or more
        for those beyond the last: how many there are is known to the GPU only.
    """
    numbers = torch.arange(num_groups + 1, device=groups.device)
    starts = torch.searchsorted(groups, numbers)
    pieces = (starts.diff() + (size - 1)) // size
    first_pieces = torch.nn.functional.pad(pieces.cumsum(0), (1, 0))
    most = min(num_groups, len(groups)) + len(groups) // size
    numbers = torch.arange(most, device=groups.device)
    group_of_piece = torch.searchsorted(first_pieces[1:], numbers, right=True)
    return starts, first_pieces, group_of_piece


def _tf32_allowed() -> bool:
    # Reading the older setting where the newer one is in use raises.
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if precision is None:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    return precision == "tf32"

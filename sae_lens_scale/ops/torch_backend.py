"""Plain PyTorch for the products of :mod:`.sparse_products` and :mod:`.grouped_products`."""

import warnings
from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F

from .autograd import SparsityPattern

# Bytes of the results that are computed at a time on the CPU: enough to keep cores busy,
# little enough to stay in their caches until copied; fewer where the copy is a transpose.
_CHUNK_BYTES = 8 << 20
_TRANSPOSED_CHUNK_BYTES = 2 << 20


def sparse_decode(
    values: torch.Tensor, weights: torch.Tensor, latents: SparsityPattern
) -> torch.Tensor:
    """``out[t] = sum_i values[t, i] weights[indices[t, i]]``; ``[tokens, width]``."""
    indices = latents.indices
    if not indices.numel():
        return weights.new_zeros(len(indices), weights.shape[-1])
    offsets = None
    if latents.ragged:
        there = indices < latents.size
        if _may_compact(indices):
            counts = there.sum(dim=-1)
            offsets = counts.cumsum(0) - counts
            indices, values = indices[there], values[there]
        else:
            indices, values = indices.where(there, 0), values.where(there, 0)
    # Rows that are not contiguous would all be gathered first.
    return F.embedding_bag(
        indices,
        _with_contiguous_rows(weights),
        offsets,
        per_sample_weights=values,
        mode="sum",
    )


def _may_compact(indices: torch.Tensor) -> bool:
    # A GPU would have to be asked how many there are.
    return indices.device.type == "cpu"


def sampled_products(
    rows: torch.Tensor, weights: torch.Tensor, latents: SparsityPattern
) -> torch.Tensor:
    """``out[t, i] = rows[t] . weights[indices[t, i]]``; ``[tokens, k]``."""
    indices = latents.indices
    if rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64):
        if not latents.ragged:
            counts = torch.full(indices.shape[:1], indices.shape[1])
            products = _sampled_addmm(rows, weights, indices.flatten(), counts)
            return products.view(indices.shape)
        there = indices < latents.size
        out = weights.new_zeros(indices.shape)
        out[there] = _sampled_addmm(rows, weights, indices[there], there.sum(dim=-1))
        return out
    if latents.ragged:
        there = indices < latents.size
        rectangular = latents._replace(indices=indices.where(there, 0), ragged=False)
        return sampled_products(rows, weights, rectangular).where(there, 0)
    out = weights.new_empty(indices.shape)
    step = max(1, _CHUNK_BYTES // max(1, indices.shape[-1] * rows[:1].nbytes))
    for first in range(0, len(rows), step):
        chunk = slice(first, first + step)
        torch.matmul(
            weights[indices[chunk]],
            rows[chunk].unsqueeze(-1),
            out=out[chunk].unsqueeze(-1),
        )
    return out


def _sampled_addmm(
    rows: torch.Tensor,
    weights: torch.Tensor,
    latents: torch.Tensor,
    counts: torch.Tensor,
) -> torch.Tensor:
    """Products of rows with so many latents each, of all rows one after the other."""
    _silence_beta_warning()
    pattern = torch.sparse_csr_tensor(
        F.pad(counts.cumsum(0), (1, 0)),
        latents,
        rows.new_zeros(len(latents)),
        (len(rows), len(weights)),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, rows, weights.T, beta=0.0).values()


@cache
def _silence_beta_warning() -> None:
    """Let torch give its one warning, that CSR tensors are in beta, to nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1).to_sparse_csr()


def latent_sums(
    values: torch.Tensor,
    rows: torch.Tensor,
    latents: SparsityPattern,
    out: torch.Tensor,
) -> None:
    """Write, for each latent, the sum of its tokens' rows times values into ``out``."""
    order, starts = latents.find_order(), latents.starts()
    end = int(starts[-1]) if latents.ragged else len(order)
    rows = _with_contiguous_rows(rows)
    tokens = order // max(1, latents.indices.shape[-1])
    weights = values.flatten()[order]
    step, boundaries = len(out), [0, end]
    if out.device.type == "cpu":
        nbytes = _CHUNK_BYTES if out.stride(-1) == 1 else _TRANSPOSED_CHUNK_BYTES
        step = max(1, nbytes // max(1, rows.element_size() * rows.shape[-1]))
        boundaries = [*starts[:-1:step].tolist(), end]
    for i, first in enumerate(range(0, len(out), step)):
        chunk = slice(boundaries[i], boundaries[i + 1])
        out[first : first + step] = F.embedding_bag(
            tokens[chunk],
            rows,
            starts[:-1][first : first + step] - boundaries[i],
            per_sample_weights=weights[chunk],
            mode="sum",
        )


def grouped_encode(
    rows: torch.Tensor, matrices: torch.Tensor, experts: SparsityPattern
) -> torch.Tensor:
    """``rows @ matrices`` of each token's experts; ``[tokens, experts_per_token, n]``."""
    shape = (*experts.indices.shape, matrices.shape[-1])
    out = rows.new_empty(experts.indices.numel(), matrices.shape[-1])
    if has_grouped_kernel(rows, *matrices.shape[1:]):
        order = experts.find_order()
        sorted_rows = rows.index_select(0, order // experts.indices.shape[-1])
        products = _grouped_mm(sorted_rows, matrices, experts)
        return out.index_copy_(0, order, products).view(shape)
    for expert, pairs, tokens in _groups(experts):
        products = rows.index_select(0, tokens) @ matrices[expert]
        # Autocast computes them in another dtype.
        out.index_copy_(0, pairs, products.to(out.dtype))
    return out.view(shape)


def grouped_decode(
    acts: torch.Tensor, matrices: torch.Tensor, experts: SparsityPattern
) -> torch.Tensor:
    """``acts @ matrices.mT``, summed over each token's experts; ``[tokens, width]``."""
    flat = acts.flatten(0, 1)
    if has_grouped_kernel(acts, *matrices.shape[1:]):
        order = experts.find_order()
        products = _grouped_mm(flat.index_select(0, order), matrices.mT, experts)
        by_pair = torch.empty_like(products).index_copy_(0, order, products)
        by_slot = by_pair.view(*experts.indices.shape, -1)
        return by_slot.sum(dim=1, dtype=torch.float32).to(acts.dtype)
    out = acts.new_zeros(len(acts), matrices.shape[1])
    # index_add_ adds row by row, but copes with a token that has an expert twice.
    distinct = experts.indices.sort(dim=-1).values.diff(dim=-1).all()
    for expert, pairs, tokens in _groups(experts):
        products = (flat.index_select(0, pairs) @ matrices[expert].T).to(out.dtype)
        if distinct:
            out.index_copy_(0, tokens, out.index_select(0, tokens).add_(products))
        else:
            out.index_add_(0, tokens, products)
    return out


def grouped_sums(
    rows: torch.Tensor, acts: torch.Tensor, experts: SparsityPattern
) -> torch.Tensor:
    """``rows.T @ acts`` over the tokens of each expert; ``[num_experts, width, n]``."""
    flat = acts.flatten(0, 1)
    if has_grouped_kernel(rows, rows.shape[-1], acts.shape[-1]):
        order = experts.find_order()
        sorted_rows = rows.index_select(0, order // experts.indices.shape[-1])
        sums = _grouped_mm(sorted_rows.T, flat.index_select(0, order), experts)
        return sums.to(rows.dtype)
    out = rows.new_zeros(experts.size, rows.shape[-1], acts.shape[-1])
    for expert, pairs, tokens in _groups(experts):
        out[expert] = rows.index_select(0, tokens).T @ flat.index_select(0, pairs)
    return out


def has_grouped_kernel(factor: torch.Tensor, *sizes: int) -> bool:
    """
    Say whether torch has a kernel of its own for grouped products of such factors.

    It has for bfloat16 on NVIDIA GPUs of compute capability 8.0 or more, where rows begin
    at multiples of 16 bytes. Elsewhere ``torch.nn.functional.grouped_mm`` is a loop.

    Args:
        factor: One of the factors.
        sizes: Lengths of the rows of factors and result.
    """
    return (
        factor.is_cuda
        and not torch.version.hip
        and hasattr(F, "grouped_mm")
        and _product_dtype(factor) == torch.bfloat16
        and torch.cuda.get_device_capability(factor.device) >= (8, 0)
        and factor.numel() > 0
        and all(size % 8 == 0 for size in sizes)
    )


def _product_dtype(factor: torch.Tensor) -> torch.dtype:
    """The dtype in which a matrix product is computed, autocast included."""
    device = factor.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return factor.dtype


def _grouped_mm(
    a: torch.Tensor, b: torch.Tensor, experts: SparsityPattern
) -> torch.Tensor:
    """torch's grouped product of what is sorted by expert, in the dtype of ``a``."""
    dtype = _product_dtype(a)
    ends = experts.starts()[1:].to(torch.int32)
    return F.grouped_mm(a.to(dtype), b.to(dtype), offs=ends).to(a.dtype)


def _groups(
    experts: SparsityPattern,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Each expert that has tokens; its (token, slot) pairs, flattened; their tokens."""
    order, counts = experts.find_order(), experts.starts().diff().tolist()
    tokens = order // experts.indices.shape[-1]
    groups = zip(order.split(counts), tokens.split(counts), strict=True)
    for expert, (pairs, its_tokens) in enumerate(groups):
        if len(pairs):
            yield expert, pairs, its_tokens


def _with_contiguous_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()

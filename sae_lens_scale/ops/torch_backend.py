"""
What computes the products of :mod:`.latent_products` and :mod:`.grouped`.

The GPU kernels of :mod:`.triton_kernels` where they support a tensor, plain PyTorch
otherwise: chosen per call, by device and dtype. Nothing here knows autograd.
"""

import os
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F

from .autograd import Selection

# Bytes of the results that are computed at a time on the CPU: enough to keep cores busy,
# little enough to stay in their caches until copied; fewer where the copy is a transpose.
_CHUNK_BYTES = 8 << 20
_TRANSPOSED_CHUNK_BYTES = 2 << 20


def _triton_for(*tensors: torch.Tensor) -> ModuleType | None:
    """The GPU kernels, if they support all of these tensors."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (tensors[0].is_cuda or interpreted) or not _has_triton():
        return None
    from . import triton_backend as triton_kernels

    return triton_kernels if all(map(triton_kernels.supports, tensors)) else None


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def sparse_decode(
    values: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """``out[t] = sum_i values[t, i] weights[indices[t, i]]``, in the dtype of weights."""
    if triton := _triton_for(values, weights):
        return triton.sparse_decode(values, weights, indices)
    if not indices.numel():
        return weights.new_zeros(len(indices), weights.shape[-1])
    # Rows that are not contiguous would all be gathered first.
    return F.embedding_bag(
        indices,
        _with_contiguous_rows(weights),
        per_sample_weights=values.to(weights.dtype),
        mode="sum",
    )


def sampled_products(
    rows: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """``out[t, i] = rows[t] . weights[indices[t, i]]``, in the dtype of weights."""
    if triton := _triton_for(rows, weights):
        return triton.sampled_products(rows, weights, indices)
    rows = rows.to(weights.dtype)
    if rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64):
        return _sampled_addmm(rows, weights, indices)
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
    rows: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    _silence_beta_warning()
    tokens, k = indices.shape
    pattern = torch.sparse_csr_tensor(
        torch.arange(tokens + 1) * k,
        indices.flatten(),
        rows.new_zeros(tokens * k),
        (tokens, len(weights)),
        check_invariants=False,
    )
    out = torch.sparse.sampled_addmm(pattern, rows, weights.T, beta=0.0)
    return out.values().view(tokens, k)


@cache
def _silence_beta_warning() -> None:
    """Let torch give its one warning, that CSR tensors are in beta, to nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1).to_sparse_csr()


def latent_sums(
    values: torch.Tensor, rows: torch.Tensor, latents: Selection, out: torch.Tensor
) -> None:
    """Write, for each latent, the sum of its tokens' rows times values into ``out``."""
    indices, order = latents.indices, latents.find_order()
    if triton := _triton_for(values, rows, out):
        triton.latent_sums(values, rows, indices, order, out)
        return
    rows = _with_contiguous_rows(rows)
    tokens = order // max(1, indices.shape[-1])
    weights = values.to(rows.dtype).flatten()[order]
    counts = torch.bincount(indices.flatten(), minlength=len(out))
    ends = counts.cumsum(0)
    step, boundaries = len(out), [0, len(order)]
    if out.device.type == "cpu":
        nbytes = _CHUNK_BYTES if out.stride(-1) == 1 else _TRANSPOSED_CHUNK_BYTES
        step = max(1, nbytes // max(1, rows.element_size() * rows.shape[-1]))
        boundaries = [0, *ends[step - 1 :: step].tolist(), len(order)]
    for i, first in enumerate(range(0, len(out), step)):
        chunk = slice(boundaries[i], boundaries[i + 1])
        starts = ends[first : first + step] - counts[first : first + step]
        out[first : first + step] = F.embedding_bag(
            tokens[chunk],
            rows,
            starts - boundaries[i],
            per_sample_weights=weights[chunk],
            mode="sum",
        )


def grouped_encode(
    rows: torch.Tensor, matrices: torch.Tensor, experts: Selection
) -> torch.Tensor:
    """``rows @ matrices`` ``[tokens, experts_per_token, n]`` of each token's experts."""
    order, shape = experts.find_order(), (*experts.indices.shape, matrices.shape[-1])
    if triton := _triton_for(rows, matrices):
        tokens = order // experts.indices.shape[-1]
        return _triton_grouped(triton, rows, tokens, matrices, experts).view(shape)
    out = rows.new_empty(len(order), matrices.shape[-1])
    for expert, pairs, tokens in _groups(experts):
        products = rows.index_select(0, tokens) @ matrices[expert]
        # Under autocast, products have another dtype than their factors.
        out.index_copy_(0, pairs, products.to(out.dtype))
    return out.view(shape)


def grouped_decode(
    acts: torch.Tensor, matrices: torch.Tensor, experts: Selection
) -> torch.Tensor:
    """``acts @ matrices.mT``, summed over each token's experts; ``[tokens, width]``."""
    flat = acts.flatten(0, 1)
    if triton := _triton_for(acts, matrices):
        order = experts.find_order()
        out = _triton_grouped(triton, flat, order, matrices.mT, experts)
        return out.view(*experts.indices.shape, matrices.shape[1]).sum(dim=1)
    out = acts.new_zeros(len(acts), matrices.shape[1])
    # index_add_ adds row by row, but copes with a token that has an expert twice.
    distinct = experts.indices.sort(dim=-1).values.diff(dim=-1).all()
    for expert, pairs, tokens in _groups(experts):
        products = flat.index_select(0, pairs) @ matrices[expert].T
        if distinct:
            out.index_copy_(0, tokens, out.index_select(0, tokens).add_(products))
        else:
            out.index_add_(0, tokens, products.to(out.dtype))
    return out


def grouped_sums(
    rows: torch.Tensor, acts: torch.Tensor, experts: Selection
) -> torch.Tensor:
    """``rows.T @ acts`` over the tokens of each expert; ``[num_experts, width, n]``."""
    out = rows.new_zeros(experts.size, rows.shape[-1], acts.shape[-1])
    flat = acts.flatten(0, 1)
    for expert, pairs, tokens in _groups(experts):
        out[expert] = rows.index_select(0, tokens).T @ flat.index_select(0, pairs)
    return out


def _triton_grouped(
    triton: ModuleType,
    rows: torch.Tensor,
    row_indices: torch.Tensor,
    matrices: torch.Tensor,
    experts: Selection,
) -> torch.Tensor:
    """One product for each (token, slot) pair, in float32 under autocast too."""
    dtype, device = rows.dtype, rows.device.type
    if torch.is_autocast_enabled(device):
        rows = rows.to(torch.get_autocast_dtype(device))
        matrices = matrices.to(torch.get_autocast_dtype(device))
    order = experts.find_order()
    expert_of_pair = experts.indices.flatten()[order]
    out = triton.grouped_products(rows, row_indices, matrices, order, expert_of_pair)
    return out.to(dtype)


def _groups(experts: Selection) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Each expert that has tokens; its (token, slot) pairs, flattened; their tokens."""
    order = experts.find_order()
    counts = torch.bincount(experts.indices.flatten(), minlength=experts.size).tolist()
    tokens = order // experts.indices.shape[-1]
    groups = zip(order.split(counts), tokens.split(counts), strict=True)
    for expert, (pairs, its_tokens) in enumerate(groups):
        if len(pairs):
            yield expert, pairs, its_tokens


def _with_contiguous_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()

"""
What computes the products of :mod:`.latent_products`, chosen per call by device and dtype.

Nothing here knows autograd.
"""

import warnings
from functools import cache

import torch
import torch.nn.functional as F

# Bytes of the results that are computed at a time: enough to keep cores busy, little
# enough to stay in a core's cache until copied.
_CHUNK_BYTES = 1 << 20


def sparse_decode(
    values: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    if not indices.numel():
        return weights.new_zeros(len(indices), weights.shape[-1])
    # Rows that are not contiguous would all be gathered first.
    return F.embedding_bag(
        indices,
        weights if weights.stride(-1) == 1 else weights.contiguous(),
        per_sample_weights=values.to(weights.dtype),
        mode="sum",
    )


def sampled_products(
    rows: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
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
        torch.arange(0, tokens * k + 1, k) if k else torch.zeros(tokens + 1).long(),
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
    values: torch.Tensor,
    rows: torch.Tensor,
    indices: torch.Tensor,
    order: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write the sums into ``out``; ``order`` sorts ``indices`` by latent, flattened."""
    num_latents = len(out)
    tokens = order // indices.shape[-1]
    weights = values.to(rows.dtype).flatten()[order]
    counts = torch.bincount(indices.flatten(), minlength=num_latents)
    ends = counts.cumsum(0)
    step, boundaries = num_latents, [0, len(order)]
    if out.device.type == "cpu":
        step = max(1, _CHUNK_BYTES // max(1, out[:1].nbytes))
        boundaries = [0, *ends[step - 1 :: step].tolist(), len(order)]
    for i, first in enumerate(range(0, num_latents, step)):
        chunk = slice(boundaries[i], boundaries[i + 1])
        starts = ends[first : first + step] - counts[first : first + step]
        out[first : first + step] = F.embedding_bag(
            tokens[chunk],
            rows if rows.stride(-1) == 1 else rows.contiguous(),
            starts - boundaries[i],
            per_sample_weights=weights[chunk],
            mode="sum",
        )

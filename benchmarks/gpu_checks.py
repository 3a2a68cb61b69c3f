"""
Correctness of every product on a GPU, against dense formulas in float64.

An error is the largest of all elements', relative to the same product of absolute values, so that
no cancellation hides or inflates it. A bound is twice the spacing of the numbers that are
multiplied, and what float32 sums of so many terms add in the worst of many random ones.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from entries import Placement, placement
from gpu_settings import EPS, Args, Precision
from processes import Item

from sae_lens_scale.ops import (
    BufferPool,
    SparseLatents,
    SparsityPattern,
    decode_dense,
    decoder_norm,
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

F64 = torch.float64
# Standard deviations of a random walk of float32 roundings, in the spacing of float32.
_WALK = 2 * torch.finfo(torch.float32).eps


def bound(precision: Precision, terms: int) -> float:
    """The largest relative error that is no mistake, of sums of so many terms."""
    return 2 * EPS[precision] + _WALK * terms**0.5


@dataclass(frozen=True)
class Case:
    """
    Tokens with their experts and latents.

    Args:
        width: Length of a token's vector.
        size: Latents of each expert.
        k: Latents of each token.
        experts: Experts of each token, ``[tokens, experts_per_token]``.
        num_experts: Number of all experts.
        repeats: Whether a token's latents are drawn of four only, with repetition.
        ragged: Whether some tokens have fewer latents than others.
    """

    width: int
    size: int
    k: int
    experts: torch.Tensor
    num_experts: int
    repeats: bool = False
    ragged: bool = False

    @property
    def d_sae(self) -> int:
        return self.num_experts * self.size

    def latents(self) -> torch.Tensor:
        """Latents of each token, of its experts unless they repeat, ``[tokens, k]``."""
        tokens, e = self.experts.shape
        device = self.experts.device
        if self.repeats:
            latents = torch.randint(4, (tokens, self.k), device=device)
        else:
            order = torch.rand(tokens, e * self.size, device=device).argsort(dim=1)
            slots, offsets = order[:, : self.k] // self.size, order[:, : self.k]
            latents = self.experts.gather(1, slots) * self.size + offsets % self.size
        if not self.ragged:
            return latents
        there = torch.rand(latents.shape, device=device) < 0.5
        return torch.where(there, latents, self.d_sae)


def cases(args: Args) -> dict[str, Case]:
    """The paper's sizes, and those that a kernel is likely to get wrong."""

    def random(n: int, e: int, tokens: int) -> torch.Tensor:
        return torch.rand(tokens, n, device=args.device).topk(e, dim=1).indices

    tokens, n, odd = (2, 4, 3) if args.quick else (1024, 64, 257)
    d_in, size = args.d_in, args.d_sae // n
    of_two = torch.tensor([1, 3], device=args.device)
    paper = Case(d_in, size, args.k, random(n, 2, tokens), n)
    return {
        f"{n}/2": paper,
        f"{4 * n}/8, 4 k": Case(
            d_in, size // 4, 4 * args.k, random(4 * n, 8, tokens), 4 * n
        ),
        f"{n // 2}/1": Case(d_in, 2 * size, args.k, random(n // 2, 1, tokens), n // 2),
        "ragged": replace(paper, ragged=True),
        "two experts, four latents": replace(
            paper, experts=of_two.expand(tokens, -1), repeats=True
        ),
        "odd sizes": Case(33, 17, 7, random(5, 2, odd), 5),
        "one expert": Case(40, 48, 5, random(1, 1, odd), 1),
        "one token": Case(33, 17, 3, random(4, 2, 1), 4),
    }


# Approximate and exact function of the same factors, shapes of these, and the most terms of a sum.
Product = tuple[Callable[..., Any], Callable[..., Any], list[tuple[int, ...]], int]


def products(case: Case) -> dict[str, Product]:
    """Every product of the package, of the case's tokens, and its formula."""
    experts, n, N, d = case.experts, case.size, case.num_experts, case.width
    (tokens, e), size, indices = experts.shape, case.d_sae, case.latents()
    pattern = SparsityPattern(indices, size, ragged=case.ragged)
    of_experts = SparsityPattern(experts, N)
    by_latent = experts.unsqueeze(-1).expand(-1, -1, n)
    rare = torch.arange(0, size, 3, device=experts.device)

    def wide(values: torch.Tensor) -> torch.Tensor:
        # The column after the last is of those that are missing.
        zeros = values.new_zeros(tokens, size + 1)
        return zeros.scatter_add(1, indices, values)[:, :size]

    def at(dense: torch.Tensor) -> torch.Tensor:
        return F.pad(dense, (0, 1)).gather(1, indices)

    def kept(
        x: torch.Tensor, minus_b_dec: torch.Tensor, W_enc: torch.Tensor
    ) -> torch.Tensor:
        dense = (x + minus_b_dec) @ W_enc
        means = dense.unflatten(1, (N, n)).mean(-1).gather(1, experts)
        return torch.cat([at(dense), means], dim=1)

    def differentiable(
        x: torch.Tensor, minus_b_dec: torch.Tensor, W_enc: torch.Tensor
    ) -> torch.Tensor:
        with torch.no_grad():
            known = kept(x.double(), minus_b_dec.double(), W_enc.double()).to(x.dtype)
        found, means = encoder_products(
            x,
            -minus_b_dec,
            W_enc,
            known[:, : case.k],
            known[:, case.k :],
            pattern,
            of_experts,
        )
        assert means is not None
        return torch.cat([found, means], dim=1)

    def spread(acts: torch.Tensor) -> torch.Tensor:
        return acts.new_zeros(tokens, N, n).scatter_add(1, by_latent, acts).flatten(1)

    values, rows, acts = (tokens, case.k), (tokens, d), (tokens, e, n)
    W_enc, W_dec = (d, size), (size, d)
    most = [int(p.starts().diff().max()) for p in (pattern, of_experts)]
    few, all_of_them = max(d, e * n, *most), max(d, tokens, size)
    result: dict[str, Product] = {
        "sparse_decode": (
            lambda v, w: sparse_decode(v, w, pattern),
            lambda v, w: wide(v) @ w,
            [values, W_dec],
            few,
        ),
        "sampled_products": (
            lambda r, w: sampled_products(r, w, pattern),
            lambda r, w: at(r @ w.T),
            [rows, W_dec],
            few,
        ),
        "latent_sums": (
            lambda v, r: latent_sums(v, r, pattern),
            lambda v, r: wide(v).T @ r,
            [values, rows],
            few,
        ),
        "transposed_latent_sums": (
            lambda v, r: transposed_latent_sums(v, r, pattern),
            lambda v, r: r.T @ wide(v),
            [values, rows],
            few,
        ),
        "grouped_encode": (
            lambda x, w: grouped_encode(x, w, experts, N),
            lambda x, w: (x @ w).unflatten(1, (N, n)).gather(1, by_latent),
            [rows, W_enc],
            few,
        ),
        "grouped_decode": (
            lambda a, w: grouped_decode(a, w, experts, N),
            lambda a, w: spread(a) @ w,
            [acts, W_dec],
            few,
        ),
        "encoder_products": (differentiable, kept, [rows, (d,), W_enc], all_of_them),
        "decode_dense": (
            decode_dense,
            lambda a, w: a @ w,
            [(tokens, size), W_dec],
            all_of_them,
        ),
        "decoder_norm": (decoder_norm, lambda w: w.norm(dim=-1), [W_dec], few),
        "index_select": (
            lambda w: index_select(w, 0, rare, BufferPool()),
            lambda w: w[rare],
            [W_dec],
            few,
        ),
        "lookup": (
            lambda table: lookup(table, experts),
            lambda table: table[experts],
            [(N, d)],
            few,
        ),
    }
    if not case.ragged:
        result["to_dense"] = (
            lambda v: SparseLatents(v, indices).to_dense(size),
            wide,
            [values],
            few,
        )
    return result


def check_products(args: Args, precision: Precision) -> Iterator[Item]:
    """Items: a case each, of all products and their gradients."""
    place = placement(precision, args.device)
    torch.manual_seed(0)
    for name, case in cases(args).items():
        yield name, partial(_check_case, case, precision, place)


def _check_case(case: Case, precision: Precision, place: Placement) -> dict[str, Any]:
    torch.manual_seed(1)
    checks = []
    for name, (fast, exact, shapes, terms) in products(case).items():
        factors = [place.randn(*shape).requires_grad_() for shape in shapes]
        with place.autocasting():
            result = fast(*factors)
        direction = torch.randn_like(result)
        got = [result, *torch.autograd.grad(result, factors, direction)]
        want = _with_gradients(exact, factors, direction)
        scales = _with_gradients(
            exact, [factor.abs() for factor in factors], direction.abs()
        )
        for label, *tensors in zip(
            ["result", *(f"gradient {i + 1}" for i in range(len(factors)))],
            got,
            want,
            scales,
            strict=True,
        ):
            checks.append(
                {
                    "check": f"{name}, {label}",
                    "error": _largest(*tensors),
                    "bound": bound(precision, terms),
                }
            )
    return {"checks": checks}


def _with_gradients(
    function: Callable[..., torch.Tensor],
    factors: Sequence[torch.Tensor],
    direction: torch.Tensor,
) -> list[torch.Tensor]:
    leaves = [factor.detach().to(F64).requires_grad_() for factor in factors]
    result = function(*leaves)
    return [result, *torch.autograd.grad(result, leaves, direction.to(F64))]


def _largest(got: torch.Tensor, want: torch.Tensor, scale: torch.Tensor) -> float:
    """Largest error of an element by its scale; what has scale 0 has to be 0."""
    error = (got.detach().to(F64) - want.detach()).abs() / scale.detach().abs()
    # 0 / 0 is right; NaN that was computed is not.
    right = (got == 0) & (scale == 0)
    return error.masked_fill(right, 0).nan_to_num(torch.inf).max().item()

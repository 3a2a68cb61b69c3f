"""
The best latents of tokens whose experts are shared out among processes.

Owners send the best ranking values of each pair home, sorted. Home finds each token's best of
all, and answers with how many of each pair are among them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int

from sae_lens_scale.saes.mixture.selection import Selected, Selection, topk

from .exchange import OwnedRows, Route


def require_topk(selection: Selection) -> None:
    """
    Refuse a selection that cannot be made of each process's best.

    Raises:
        ValueError: If it is no TopK of each token.
    """
    if selection.select is not topk:
        raise ValueError(
            "selection must be a TopK of each token where experts are shared out among "
            f"processes, got {selection.select}"
        )


class Shortlist(NamedTuple):
    """
    The best candidates of each pair.

    Attributes:
        values: What they are ranked by, sorted, ``[pairs, best]``.
        candidates: Number of candidates of a pair.
        sizes: Numbers of candidates that a token keeps, ascending.
    """

    values: Float[torch.Tensor, "pairs best"]
    candidates: int
    sizes: Sequence[int]


def lengths_kept(
    route: Route, shortlists: Sequence[Shortlist]
) -> list[Int[torch.Tensor, "pairs sizes"]]:
    """
    Find how many of each pair's best are among the best of its token.

    Args:
        route: The way home.
        shortlists: Candidates of several kinds, each ranked by itself; all travel together.

    Returns:
        For each shortlist and size the number that a pair keeps, ``[pairs, sizes]``.
    """
    e = route.experts_per_token
    lengths = [
        s.values.new_full((len(s.values), len(s.sizes)), s.candidates, dtype=torch.long)
        for s in shortlists
    ]
    # Nobody has to ask for a token that keeps all that it has.
    asked = [i for i, s in enumerate(shortlists) if s.sizes[0] < e * s.candidates]
    if not asked:
        return lengths
    values = torch.cat([shortlists[i].values for i in asked], dim=-1)
    widths = [shortlists[i].values.shape[-1] for i in asked]
    values = route.pairs_home(values, "ranking values")
    at_home = torch.empty_like(values)
    at_home[route.pair_slots] = values
    counts = []
    for i, width, of_pairs in zip(
        asked, widths, at_home.split(widths, dim=-1), strict=True
    ):
        counts += _counts(of_pairs.reshape(route.tokens, e, width), shortlists[i].sizes)
    sent = torch.stack(counts, dim=-1)[route.pair_slots].int()
    answers = route.pairs_to_owners(sent, "selected").long()
    answered = answers.split([len(shortlists[i].sizes) for i in asked], dim=-1)
    for i, answer in zip(asked, answered, strict=True):
        lengths[i] = answer
    return lengths


def _counts(values: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """For each size, how many of a token's best each pair has, ``[tokens * e]``."""
    tokens, e, most = values.shape
    # Once for all sizes: among equal values the smaller ones have to keep what the
    # larger ones do.
    best = values.flatten(1).topk(min(sizes[-1], e * most), dim=-1).indices // most
    counts = []
    for size in sizes:
        count = best.new_zeros(tokens, e)
        count.scatter_add_(1, best[:, :size], torch.ones_like(best[:, :size]))
        counts.append(count.flatten())
    return counts


def keep(
    rows: OwnedRows,
    lengths: Int[torch.Tensor, "pairs sizes"],
    positions: Int[torch.Tensor, "pairs best"],
    products: Float[torch.Tensor, "pairs best"],
) -> tuple[Selected, torch.Tensor]:
    """
    Bring together what the pairs of each row keep.

    Args:
        rows: The rows.
        lengths: Numbers of a pair's best that are kept, for each size, ascending.
        positions: Positions of a pair's best among its row's candidates.
        products: Their products with the encoder.

    Returns:
        The candidates that rows keep, and their products, ``[rows, m]``.
    """
    num_rows, num_pairs = len(rows.x), len(positions)
    row = rows.pair_rows(rows.pair_places)
    slot = rows.pair_places - row * rows.experts.shape[1]
    first = torch.arange(num_pairs, device=slot.device) - slot
    starts = torch.cat([torch.zeros_like(lengths[:, :1]), lengths[:, :-1]], dim=-1)
    numbers = lengths - starts
    # Of each pair, those that its row keeps of pairs before it.
    before = numbers.cumsum(0) - numbers
    before = before - before[first]
    # One at least: that there are runners-up must not depend on the process.
    widths = [1] * lengths.shape[1]
    if num_pairs:
        widths = (before + numbers).amax(dim=0).clamp(min=1).tolist()
    width = sum(widths)
    column = torch.arange(positions.shape[1], device=slot.device)
    # Beyond the last, to be cut off.
    place = torch.full_like(positions, num_rows * width)
    for i in range(len(widths)):
        start, end, ahead = (t[:, i, None] for t in (starts, lengths, before))
        at = row.unsqueeze(-1) * width + sum(widths[:i]) + ahead + column - start
        place = torch.where((column >= start) & (column < end), at, place)

    def by_row(values: torch.Tensor) -> torch.Tensor:
        flat = values.new_zeros(num_rows * width + 1)
        flat.scatter_(0, place.flatten(), values.flatten())
        return flat[:-1].view(num_rows, width)

    mask = by_row(torch.ones_like(positions, dtype=torch.bool))
    return Selected(by_row(positions), tuple(widths), mask), by_row(products)


def is_among_best(ranking: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """
    Say which candidates are so many of the best ones.

    Args:
        ranking: Values to rank by, ``[..., candidates]``.
        lengths: Numbers of the best, ``[..., 1]``.

    Returns:
        True at the best, in the shape of ``ranking``.
    """
    order = ranking.argsort(dim=-1, descending=True)
    best = torch.arange(ranking.shape[-1], device=ranking.device) < lengths
    return torch.zeros_like(best).scatter_(-1, order, best)

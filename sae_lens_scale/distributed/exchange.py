"""
The way of tokens to the processes that hold their experts, and back.

Each token has a home, the process that read it. Every process of a group owns some experts.
A row is a distinct (token, owner), a pair a distinct (token, expert): a row travels once,
however many of its token's experts are there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int

from sae_lens_scale.saes.mixture.dispatch import Rows

from .groups import Group
from .ownership import Ownership


@dataclass(frozen=True)
class Route:
    """
    A batch's way to the owners, and back.

    At home, in the order of owners and tokens:

    Attributes:
        group: The processes.
        tokens: Number of tokens.
        experts_per_token: Number of experts of each (e).
        row_tokens: Token of each row, ``[rows sent]``.
        pair_slots: Each pair's place among all pairs of the batch, ``token * e + slot``,
            ``[pairs sent]``.
        rows_sent: Number of rows for each owner.
        pairs_sent: Number of pairs, likewise.
        rows_received: Number of rows that this process owns, by home.
        pairs_received: Number of pairs, likewise.
    """

    group: Group
    tokens: int
    experts_per_token: int
    row_tokens: Int[torch.Tensor, " rows_sent"]
    pair_slots: Int[torch.Tensor, " pairs_sent"]
    rows_sent: list[int]
    pairs_sent: list[int]
    rows_received: list[int]
    pairs_received: list[int]

    def pairs_home(self, pairs: torch.Tensor, purpose: str) -> torch.Tensor:
        """Send a value, or several, for each pair home."""
        return self.group.all_to_all(
            pairs, self.pairs_sent, self.pairs_received, purpose
        )

    def pairs_to_owners(self, pairs: torch.Tensor, purpose: str) -> torch.Tensor:
        """Send a value, or several, for each pair to its owner."""
        return self.group.all_to_all(
            pairs, self.pairs_received, self.pairs_sent, purpose
        )

    def rows_home(self, rows: torch.Tensor, purpose: str) -> torch.Tensor:
        """Send rows home, differentiably."""
        return _RowsHome.apply(rows, self, purpose)


class _RowsHome(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, route: Route, purpose: str
    ) -> torch.Tensor:
        ctx.route, ctx.purpose = route, purpose
        return route.group.all_to_all(
            rows, route.rows_sent, route.rows_received, purpose
        )

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        route: Route = ctx.route
        back = route.group.all_to_all(
            grads[0], route.rows_received, route.rows_sent, f"{ctx.purpose}, gradients"
        )
        return back, None, None


class _GatesToOwners(torch.autograd.Function):
    """Gates of rows' experts, which have travelled with the rows; gradients travel home."""

    @staticmethod
    def forward(
        ctx: Any,
        gates: torch.Tensor,
        received: torch.Tensor,
        pair_places: torch.Tensor,
        route: Route,
    ) -> torch.Tensor:
        ctx.route, ctx.shape = route, gates.shape
        ctx.save_for_backward(pair_places)
        return received

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None]:
        route: Route = ctx.route
        (pair_places,) = ctx.saved_tensors
        of_pairs = grads[0].flatten().index_select(0, pair_places)
        home = route.pairs_home(of_pairs, "gates, gradients")
        gradient = home.new_zeros(ctx.shape)
        gradient.view(-1)[route.pair_slots] = home
        return gradient, None, None, None


@dataclass(frozen=True)
class OwnedRows(Rows):
    """
    Rows of the experts that this process owns: distinct (token, owner).

    All rows have as many experts as the one that has most (e): beyond its own a row names
    expert 0, with gate 0, of which nothing is kept.

    Attributes:
        route: The way that their tokens came.
        pair_places: Place of each pair among all rows' experts, ``row * e + slot``, ascending,
            ``[pairs]``.
    """

    route: Route
    pair_places: Int[torch.Tensor, " pairs"]

    def pair_rows(self, places: torch.Tensor) -> torch.Tensor:
        """Rows of pairs, by their places."""
        return places // self.experts.shape[1]

    def pairs(self, places: torch.Tensor) -> Rows:
        """Pairs as rows of one expert each, with inputs of their own; by their places."""
        experts, gates = (
            t.flatten().index_select(0, places).unsqueeze(-1)
            for t in (self.experts, self.gates)
        )
        x = self.x.index_select(0, self.pair_rows(places))
        return Rows(x, self.b_dec, experts, gates, places.shape)

    def of_pairs(self, values: torch.Tensor) -> torch.Tensor:
        """Values of pairs, ``[pairs]``, as those of rows' experts, ``[rows, e]``; else 0."""
        flat = values.new_zeros(self.experts.numel())
        return flat.index_copy_(0, self.pair_places, values).view(self.experts.shape)

    def combine(self, partial: torch.Tensor) -> torch.Tensor:
        """Sum results of rows, ``[rows, width]``, to those of tokens at home."""
        rows = self.route.rows_home(partial, "reconstructions")
        tokens = rows.new_zeros(self.route.tokens, rows.shape[-1])
        return add_rows(tokens, self.route.row_tokens, rows)


def add_rows(
    total: torch.Tensor, places: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Add rows to those of ``total`` at places, ``[rows]``, in place; returns it."""
    # For its backward pass index_add_ would keep the rows themselves.
    return total.scatter_add_(0, places.unsqueeze(-1).expand_as(rows), rows)


def send_to_owners(
    rows: Rows,
    ownership: Ownership,
    group: Group,
) -> OwnedRows:
    """
    Send tokens to the processes that hold their experts.

    Args:
        rows: The tokens of this process.
        ownership: Who holds which experts.
        group: These processes.

    Returns:
        The rows that this process owns. They are differentiable in gates and b_dec.

    Raises:
        ValueError: If activations need a gradient, which does not travel.
    """
    if rows.x.requires_grad:
        raise ValueError(
            "x must not need a gradient where experts are shared out among processes"
        )
    tokens, e = rows.experts.shape
    owners, places = ownership.places(rows.x.device)
    owner, order = owners[rows.experts].flatten().sort(stable=True)
    token = order // max(1, e)
    is_first = torch.ones_like(order, dtype=torch.bool)
    is_first[1:] = (owner[1:] != owner[:-1]) | (token[1:] != token[:-1])
    # By owner: rows, pairs, and the most pairs of a row.
    counts = owner.new_zeros(group.size, 3)
    counts[:, 0].index_add_(0, owner, is_first.long())
    counts[:, 1].index_add_(0, owner, torch.ones_like(owner))
    counts[:, 2].scatter_reduce_(0, owner, _slots(is_first) + 1, "amax")
    ones = [1] * group.size
    received = group.all_to_all(counts, ones, ones, "counts")
    # The host waits for the device here, and nowhere else on the way.
    sent_numbers, received_numbers = torch.stack([counts, received]).tolist()
    rows_sent, pairs_sent, _ = map(list, zip(*sent_numbers, strict=True))
    rows_received, pairs_received, most = map(list, zip(*received_numbers, strict=True))
    row = is_first.cumsum(0) - 1
    row_tokens = row.new_empty(sum(rows_sent)).scatter_(0, row, token)
    # Of each pair, the row among those of its owner.
    pair_row = row - (counts[:, 0].cumsum(0) - counts[:, 0])[owner]
    columns = [
        (rows.x[row_tokens], rows_sent, rows_received),
        (pair_row.int(), pairs_sent, pairs_received),
        (places[rows.experts].flatten()[order].int(), pairs_sent, pairs_received),
        (rows.gates.detach().flatten()[order], pairs_sent, pairs_received),
    ]
    x, pair_row, place, gates = _send_together(columns, group, "tokens")
    first_rows = received[:, 0].cumsum(0) - received[:, 0]
    pair_row = pair_row.long() + first_rows.repeat_interleave(
        received[:, 1], output_size=len(pair_row)
    )
    is_first = torch.ones_like(pair_row, dtype=torch.bool)
    is_first[1:] = pair_row[1:] != pair_row[:-1]
    route = Route(
        group=group,
        tokens=tokens,
        experts_per_token=e,
        row_tokens=row_tokens,
        pair_slots=order,
        rows_sent=rows_sent,
        pairs_sent=pairs_sent,
        rows_received=rows_received,
        pairs_received=pairs_received,
    )
    shape = (len(x), max(1, *most))
    owned = OwnedRows(
        x=x,
        b_dec=rows.b_dec,
        experts=pair_row.new_zeros(shape),
        gates=gates.new_zeros(shape),
        shape=x.shape[:1],
        route=route,
        pair_places=pair_row * shape[1] + _slots(is_first),
    )
    received_gates = owned.of_pairs(gates)
    return replace(
        owned,
        experts=owned.of_pairs(place.long()),
        gates=_GatesToOwners.apply(
            rows.gates, received_gates, owned.pair_places, route
        ),
    )


def _slots(is_first: torch.Tensor) -> torch.Tensor:
    """Places of pairs within their rows, given which are a row's first, ``[pairs]``."""
    place = torch.arange(len(is_first), device=is_first.device)
    return place - torch.where(is_first, place, 0).cummax(0).values


def _send_together(
    columns: Sequence[tuple[torch.Tensor, list[int], list[int]]],
    group: Group,
    purpose: str,
) -> list[torch.Tensor]:
    """
    Send tensors in one exchange.

    Args:
        columns: Tensors, each by receiver, with its numbers of rows for and from each process.
        group: The processes.
        purpose: Name that the bytes are counted under.

    Returns:
        The tensors received, each by sender.
    """
    row_bytes = [t.shape[1:].numel() * t.element_size() for t, _, _ in columns]

    def sizes(of_column: Callable[[int], list[int]]) -> list[list[int]]:
        """Bytes of each column, by process."""
        return [[n * row_bytes[i] for n in of_column(i)] for i in range(len(columns))]

    sent, received = sizes(lambda i: columns[i][1]), sizes(lambda i: columns[i][2])
    parts = [
        t.contiguous().view(-1).view(torch.uint8).split(n)
        for (t, _, _), n in zip(columns, sent, strict=True)
    ]
    buffer = torch.cat(
        [part for by_rank in zip(*parts, strict=True) for part in by_rank]
    )
    buffer = group.all_to_all(
        buffer,
        [sum(n) for n in zip(*received, strict=True)],
        [sum(n) for n in zip(*sent, strict=True)],
        purpose,
    )
    pieces = buffer.split(
        [n for by_rank in zip(*received, strict=True) for n in by_rank]
    )
    result = []
    for i, (t, _, counts) in enumerate(columns):
        # Copied, as its place in the buffer may not be one that its dtype can start at.
        joined = torch.cat(pieces[i :: len(columns)])
        result.append(joined.view(t.dtype).view(sum(counts), *t.shape[1:]))
    return result

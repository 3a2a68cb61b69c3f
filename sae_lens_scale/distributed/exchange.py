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
from typing_extensions import override

from sae_lens_scale.saes.mixture.dispatch import Rows
from sae_lens_scale.saes.mixture.selection import Selected, Selection, topk

from .groups import Group

# Dimensions of parameters that count experts or their latents. All others are the same on
# every process.
EXPERT_DIMENSIONS = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "omega": 0}


@dataclass(frozen=True)
class Ownership:
    """
    The experts that the processes of a group hold.

    All hold the shared experts, which every token selects, so that none gets all tokens. The
    others are held by one each: as many neighbouring experts as possible, equally many, or
    one more.

    Attributes:
        num_experts: Number of experts.
        num_shared: Number of them, the first ones, that are shared.
        rank: Place of this process.
        size: Number of processes.
    """

    num_experts: int
    num_shared: int
    rank: int
    size: int

    def __post_init__(self) -> None:
        if self.num_routed < self.size:
            raise ValueError(
                f"expert_parallel must be at most the {self.num_routed} experts that are "
                f"not shared, got {self.size}"
            )

    @property
    def num_routed(self) -> int:
        """Number of experts that are not shared."""
        return self.num_experts - self.num_shared

    def first(self, rank: int) -> int:
        """First of the experts that a process alone holds."""
        return self.num_shared + rank * self.num_routed // self.size

    def held(self, rank: int) -> list[int]:
        """Numbers of a process's experts, in the order of its weights."""
        own = range(self.first(rank), self.first(rank + 1))
        return [*range(self.num_shared), *own]

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This process's part of a parameter, or of a tensor of its shape; copied."""
        if self.size == 1 or name not in EXPERT_DIMENSIONS:
            return whole.clone()
        dim = EXPERT_DIMENSIONS[name]
        held = torch.tensor(self.held(self.rank), device=whole.device)
        experts = whole.unflatten(dim, (self.num_experts, -1))
        return experts.index_select(dim, held).flatten(dim, dim + 1)

    def gathered(
        self, name: str, part: torch.Tensor, group: Group
    ) -> torch.Tensor | None:
        """
        Gather a parameter, or a tensor of its shape, from its parts.

        Args:
            name: The parameter's name.
            part: This process's part.
            group: The processes that hold the others, all of which call this together.

        Returns:
            The whole on the CPU; None on all processes but the first.
        """
        if self.size == 1 or name not in EXPERT_DIMENSIONS:
            return part.detach().cpu().clone() if group.rank == 0 else None
        dim = EXPERT_DIMENSIONS[name]
        num_held = len(self.held(self.rank))
        # Experts first, whose number differs.
        experts = part.detach().unflatten(dim, (num_held, -1)).movedim(dim, 0)
        parts = group.gather(experts, "whole SAE")
        if parts is None:
            return None
        own = [p if r == 0 else p[self.num_shared :] for r, p in enumerate(parts)]
        whole = torch.cat([p.cpu() for p in own]).movedim(0, dim)
        return whole.flatten(dim, dim + 1).contiguous()

    def places(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Owner of each expert and its place in the owner's weights, ``[num_experts]`` each."""
        owners = torch.full((self.num_experts,), self.rank)
        places = torch.arange(self.num_experts)
        for rank in range(self.size):
            own = slice(self.first(rank), self.first(rank + 1))
            owners[own] = rank
            places[own] += self.num_shared - self.first(rank)
        return owners.to(device), places.to(device)


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
        pair_rows: Row of each pair that this process owns, ``[pairs received]``.
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
    pair_rows: Int[torch.Tensor, " pairs_received"]

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
    """Gates of a token's pairs, which have travelled with its row; gradients travel home."""

    @staticmethod
    def forward(
        ctx: Any, gates: torch.Tensor, received: torch.Tensor, route: Route
    ) -> torch.Tensor:
        ctx.route, ctx.shape = route, gates.shape
        return received

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        route: Route = ctx.route
        home = route.pairs_home(grads[0], "gates, gradients")
        gradient = home.new_zeros(ctx.shape)
        gradient.view(-1)[route.pair_slots] = home
        return gradient, None, None


@dataclass(frozen=True)
class OwnedRows(Rows):
    """
    Pairs that this process owns, as rows of one expert each.

    Attributes:
        route: The way that their tokens came.
    """

    route: Route

    @override
    def adapt(self, selection: Selection) -> Selection:
        require_topk(selection)
        return replace(selection, select=self._select, per_token=False)

    def _select(self, ranking: torch.Tensor, sizes: Sequence[int]) -> Selected:
        """
        Keep the best of each token, among all of its pairs.

        Owners send the best ranking values of each pair home, sorted, and learn how many of
        them are among the token's best.

        Args:
            ranking: Values to rank by, ``[pairs, candidates]``.
            sizes: Numbers of candidates that a token keeps, ascending.
        """
        route = self.route
        num_pairs, candidates = ranking.shape
        e = route.experts_per_token
        if len(sizes) == 1 and sizes[0] >= e * candidates:
            # A token keeps all that it has: nobody has to ask.
            return topk(ranking, (candidates,))
        # As many on every process, also on one without tokens.
        most = min(sizes[-1], candidates)
        best = ranking.topk(most, dim=-1)
        values = route.pairs_home(best.values, "ranking values")
        at_home = torch.empty_like(values)
        at_home[route.pair_slots] = values
        of_token = at_home.view(route.tokens, e * most)
        counts = []
        # Once for all sizes: among equal values the smaller ones have to keep what the
        # larger ones do.
        kept = of_token.topk(min(sizes[-1], e * most), dim=-1).indices // most
        for size in sizes:
            count = kept.new_zeros(route.tokens, e)
            count.scatter_add_(1, kept[:, :size], torch.ones_like(kept[:, :size]))
            counts.append(count.flatten())
        sent = torch.stack(counts, dim=-1)[route.pair_slots].int()
        lengths = route.pairs_to_owners(sent, "selected").long()
        positions, masks, start = [], [], lengths.new_zeros(num_pairs)
        for end in lengths.unbind(dim=-1):
            # One at least: whether there are runners-up must not depend on the process.
            width = max(1, int((end - start).max())) if num_pairs else 1
            column = torch.arange(width, device=ranking.device)
            masks.append(column < (end - start).unsqueeze(-1))
            place = (start.unsqueeze(-1) + column).clamp(max=most - 1)
            positions.append(best.indices.gather(-1, place))
            start = end
        return Selected(
            torch.cat(positions, dim=-1),
            tuple(mask.shape[-1] for mask in masks),
            torch.cat(masks, dim=-1),
        )

    def combine(self, partial: torch.Tensor) -> torch.Tensor:
        """Sum results of pairs, ``[pairs, width]``, to those of tokens at home."""
        route = self.route
        rows = partial.new_zeros(sum(route.rows_received), partial.shape[-1])
        rows = rows.index_add(0, route.pair_rows, partial)
        rows = route.rows_home(rows, "reconstructions")
        tokens = rows.new_zeros(route.tokens, rows.shape[-1])
        return tokens.index_add(0, route.row_tokens, rows)


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
        The pairs that this process owns. They are differentiable in gates and b_dec.

    Raises:
        ValueError: If activations need a gradient, which does not travel.
    """
    if rows.x.requires_grad:
        raise ValueError(
            "x must not need a gradient where experts are shared out among processes"
        )
    tokens, e = rows.experts.shape
    device = rows.x.device
    owners, places = ownership.places(device)
    owner, order = owners[rows.experts].flatten().sort(stable=True)
    token = order // max(1, e)
    is_first = torch.ones_like(order, dtype=torch.bool)
    is_first[1:] = (owner[1:] != owner[:-1]) | (token[1:] != token[:-1])
    counts = torch.stack(
        [
            torch.bincount(owner[is_first], minlength=group.size),
            torch.bincount(owner, minlength=group.size),
        ],
        dim=-1,
    )
    ones = [1] * group.size
    received = group.all_to_all(counts, ones, ones, "counts")
    rows_sent, pairs_sent = counts.T.tolist()
    rows_received, pairs_received = received.T.tolist()
    first_rows = counts[:, 0].cumsum(0) - counts[:, 0]
    # Of each pair, the row among those of its owner.
    pair_row = is_first.cumsum(0) - 1 - first_rows[owner]
    gates = rows.gates.flatten()[order]
    place = places[rows.experts].flatten()[order]
    columns = [
        (rows.x[token[is_first]], rows_sent, rows_received),
        (pair_row.int(), pairs_sent, pairs_received),
        (place.int(), pairs_sent, pairs_received),
        (gates.detach(), pairs_sent, pairs_received),
    ]
    x, pair_row, place, sent_gates = _send_together(columns, group, "tokens")
    offsets = received[:, 0].cumsum(0) - received[:, 0]
    pair_rows = pair_row.long() + offsets.repeat_interleave(received[:, 1])
    route = Route(
        group=group,
        tokens=tokens,
        experts_per_token=e,
        row_tokens=token[is_first],
        pair_slots=order,
        rows_sent=rows_sent,
        pairs_sent=pairs_sent,
        rows_received=rows_received,
        pairs_received=pairs_received,
        pair_rows=pair_rows,
    )
    own_gates = _GatesToOwners.apply(rows.gates, sent_gates, route)
    return OwnedRows(
        x=x[pair_rows],
        b_dec=rows.b_dec,
        experts=place.long().unsqueeze(-1),
        gates=own_gates.unsqueeze(-1),
        shape=pair_rows.shape,
        route=route,
    )


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

"""Selection: the rule by which candidates survive."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int

TopKOver = Literal["activations", "gated_activations"]


class Selected(NamedTuple):
    """
    Candidates of each token that a selection keeps.

    Attributes:
        positions: Positions among a token's candidates, ``[tokens, m]``, int64; distinct
            where they are kept.
        widths: Number of columns that belong to each size, in order; they add up to m.
        mask: True where these are kept, ``[tokens, m]``, for a rule that keeps more for one
            token than for another; None if all are.
    """

    positions: Int[torch.Tensor, "tokens m"]
    widths: tuple[int, ...]
    mask: Bool[torch.Tensor, "tokens m"] | None = None

    @staticmethod
    def concatenate(parts: Sequence["Selected"]) -> "Selected":
        """Selections of consecutive parts of a batch as that of the whole."""
        if len(parts) == 1:
            return parts[0]
        masks = [part.mask for part in parts if part.mask is not None]
        return Selected(
            torch.cat([part.positions for part in parts]),
            parts[0].widths,
            torch.cat(masks) if masks else None,
        )


@dataclass(frozen=True)
class Selection:
    """
    A rule that decides which candidates survive.

    The encoder calls ``rank`` and then ``select``, without gradients. ``select`` gets the
    ranking of all candidates, ``[tokens, candidates]``, and ascending sizes; for each size
    it returns the candidates that a TopK of so many latents per token keeps and those of
    the smaller sizes do not: for ``(k,)`` the survivors, for ``(k, 4 * k)`` the survivors
    and after them the runners-up that the Multi-TopK loss trains. Where there are fewer
    candidates than asked for, it returns all of them. A rule whose survivors of one token
    depend on that token alone says so with ``per_token``, and may be given a part of the
    batch at a time; any other one always sees the whole batch.

    Attributes:
        rank: Ranking values, from pre-activations ``[tokens, experts_per_token,
            expert_size]`` (decoder norms included, if they count) and gates ``[tokens,
            experts_per_token]``.
        select: Survivors, as above.
        per_token: Whether ``select`` may see a part of the batch at a time.
        meaning: Description for the documentation.
    """

    rank: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    select: Callable[[torch.Tensor, Sequence[int]], Selected]
    per_token: bool
    meaning: str


def topk(
    ranking: Float[torch.Tensor, "tokens candidates"], sizes: Sequence[int]
) -> Selected:
    """
    Keep each token's largest candidates.

    Args:
        ranking: Values to rank by, ``[tokens, candidates]``.
        sizes: Numbers of candidates to keep, ascending; see :class:`Selection`.

    Returns:
        Their positions, the largest first where there are several sizes, else in any order.
    """
    candidates = ranking.shape[-1]
    ends = [min(size, candidates) for size in sizes]
    widths = tuple(end - start for start, end in pairwise([0, *ends]))
    if ends == [candidates]:
        everything = torch.arange(candidates, device=ranking.device)
        return Selected(everything.expand(len(ranking), -1), widths)
    best = ranking.topk(ends[-1], dim=-1, sorted=len(ends) > 1)
    return Selected(best.indices, widths)


# Selections by the value of the config field topk_over.
SELECTIONS: dict[TopKOver, Selection] = {
    "activations": Selection(
        rank=lambda pre_acts, _: pre_acts,
        select=topk,
        per_token=True,
        meaning="the k largest h of a token (equation 2.3 of the Scale SAE paper)",
    ),
    "gated_activations": Selection(
        rank=lambda pre_acts, gates: pre_acts * gates.unsqueeze(-1),
        select=topk,
        per_token=True,
        meaning="the k largest g · h of a token (the Scale SAE authors' code)",
    ),
}

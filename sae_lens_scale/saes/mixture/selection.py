"""Selection: candidates, and the rule by which some of them survive."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int

from sae_lens_scale.ops import lookup

from .feature_scaling import ExpertScaling

# Candidates that are ranked at a time on the CPU: as many as stay in a core's cache.
_AT_A_TIME = 1 << 17

TopKOver = Literal["activations", "gated_activations"]


class Selected(NamedTuple):
    """
    Candidates of each token that a selection keeps.

    Attributes:
        positions: Positions among a token's candidates, ``[rows, m]``, int64; distinct
            where they are kept.
        widths: Number of columns that belong to each size, in order; they add up to m.
        mask: True where these are kept, ``[rows, m]``, for a rule that keeps more for one
            token than for another; None if all are.
    """

    positions: Int[torch.Tensor, "rows m"]
    widths: tuple[int, ...]
    mask: Bool[torch.Tensor, "rows m"] | None = None


@dataclass(frozen=True)
class Selection:
    """
    A rule that decides which candidates survive.

    The encoder calls ``rank`` and then ``select``, without gradients. ``select`` gets the
    ranking of all candidates, ``[rows, candidates]``, and ascending sizes such as
    ``(k, 4 * k)``. It returns columns in that order: first the survivors, then those that
    the next size adds (the runners-up of the Multi-TopK loss), or all candidates where there
    are fewer. With ``per_token`` it keeps the same number of latents of every row, has no
    mask, and may see a part of the batch; otherwise it sees the whole batch.

    Attributes:
        rank: Ranking values, from pre-activations ``[rows, e, n]`` (decoder norms included,
            if they count) and gates ``[rows, e]``.
        select: Survivors, as above.
        per_token: Whether ``select`` may see a part of the batch at a time.
        meaning: Description for the documentation.
    """

    rank: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    select: Callable[[torch.Tensor, Sequence[int]], Selected]
    per_token: bool
    meaning: str


def topk(
    ranking: Float[torch.Tensor, "rows candidates"], sizes: Sequence[int]
) -> Selected:
    """
    Keep each token's largest candidates.

    Args:
        ranking: Values to rank by, ``[rows, candidates]``.
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


@dataclass(frozen=True)
class Candidates:
    """
    Candidates of a selection: n latents of each selected expert, all of them or dead ones.

    Attributes:
        products: Products with their encoder vectors, ``[rows, e, n]``.
        experts: The selected experts, ``[rows, e]``.
        gates: Gates of these, ``[rows, e]``.
        b_enc: Biases of every expert's latents, ``[num_experts, n]``.
        norms: Decoder norms that they are ranked with, ``[num_experts, n]``; None without.
        scaling: Feature scaling of the selected experts; None without.
    """

    products: Float[torch.Tensor, "rows e n"]
    experts: Int[torch.Tensor, "rows e"]
    gates: Float[torch.Tensor, "rows e"]
    b_enc: Float[torch.Tensor, "num_experts n"]
    norms: Float[torch.Tensor, "num_experts n"] | None
    scaling: ExpertScaling | None

    def pre_acts(self) -> Float[torch.Tensor, "rows e n"]:
        """Pre-activations, before any norm or gate."""
        bias = lookup(self.b_enc, self.experts)
        if self.scaling is None:
            return self.products + bias
        return self.scaling.apply(self.products, bias)

    @torch.no_grad()
    def select(
        self, pre_acts: torch.Tensor, selection: Selection, sizes: Sequence[int]
    ) -> Selected:
        """Survivors among candidates of these pre-activations, which may be edited ones."""
        ranking = selection.rank(
            self.with_norms(pre_acts), self.gates.to(pre_acts.dtype)
        )
        return selection.select(ranking.flatten(1), sizes)

    def with_norms(self, pre_acts: torch.Tensor) -> torch.Tensor:
        """Pre-activations times the decoder norms that they are ranked with."""
        return pre_acts if self.norms is None else pre_acts * self.norms[self.experts]

    @torch.no_grad()
    def select_in_parts(self, selection: Selection, sizes: Sequence[int]) -> Selected:
        """Survivors, found without the pre-activations of all candidates at once."""
        step = len(self.products)
        if self.products.device.type == "cpu" and selection.per_token:
            step = _AT_A_TIME // self.products.shape[1:].numel()
        columns = [self.products, self.experts, self.gates, *(self.scaling or ())]
        found = []
        for products, experts, gates, *scaling in zip(
            *(column.split(max(1, step)) for column in columns), strict=True
        ):
            part = replace(
                self,
                products=products,
                experts=experts,
                gates=gates,
                scaling=ExpertScaling(*scaling) if scaling else None,
            )
            found.append(part.select(part.pre_acts(), selection, sizes))
        if len(found) == 1:
            return found[0]
        widths = {selected.widths for selected in found}
        if len(widths) > 1 or any(selected.mask is not None for selected in found):
            raise ValueError(
                "a selection with per_token=True must keep as many latents of each token "
                f"and have no mask, got widths {sorted(widths)}"
            )
        positions = torch.cat([selected.positions for selected in found])
        return Selected(positions, found[0].widths)

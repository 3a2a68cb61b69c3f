"""Candidates: the latents that a selection chooses from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int

from sae_lens_scale.ops import lookup

from .feature_scaling import ExpertScaling
from .selection import Selected, Selection

# Candidates that are ranked at a time on the CPU: as many as stay in a core's cache.
_AT_A_TIME = 1 << 17


@dataclass(frozen=True)
class Candidates:
    """
    Some latents of each selected expert, n of each: all of them, or the dead ones.

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
        products = self.products
        if self.scaling is not None:
            scale, shift = (t.unsqueeze(-1) for t in self.scaling)
            products = torch.addcmul(shift, products, scale)
        return products + lookup(self.b_enc, self.experts)

    @torch.no_grad()
    def select(
        self, pre_acts: torch.Tensor, selection: Selection, sizes: Sequence[int]
    ) -> Selected:
        """Survivors among candidates of these pre-activations, which may be edited ones."""
        if self.norms is not None:
            pre_acts = pre_acts * self.norms[self.experts]
        ranking = selection.rank(pre_acts, self.gates.to(pre_acts.dtype))
        return selection.select(ranking.flatten(1), sizes)

    @torch.no_grad()
    def select_in_parts(
        self, selection: Selection, sizes: Sequence[int]
    ) -> tuple[Selected, Float[torch.Tensor, "rows m"]]:
        """Survivors and their pre-activations, without those of all candidates at once."""
        rows, step = len(self.products), len(self.products)
        if self.products.device.type == "cpu" and selection.per_token:
            step = _AT_A_TIME // self.products.shape[1:].numel()
        found = []
        for first in range(0, max(1, rows), max(1, step)):
            part = self._part(slice(first, first + max(1, step)))
            pre_acts = part.pre_acts()
            selected = part.select(pre_acts, selection, sizes)
            found.append((selected, pre_acts.flatten(1).gather(1, selected.positions)))
        parts, pre_acts = zip(*found, strict=True)
        return Selected.concatenate(parts), torch.cat(pre_acts)

    def _part(self, rows: slice) -> "Candidates":
        scaling = self.scaling
        return replace(
            self,
            products=self.products[rows],
            experts=self.experts[rows],
            gates=self.gates[rows],
            scaling=scaling and ExpertScaling(*(t[rows] for t in scaling)),
        )

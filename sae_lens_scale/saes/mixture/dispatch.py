"""Dispatch: the way of tokens to the experts that they selected."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Rows:
    """
    Tokens where their experts are: the input of everything after the router.

    In one process rows are the tokens of the batch, flattened. Where experts are held in
    several places, a place has a row for each token that selected some of its experts, and
    ``experts`` counts those that it holds.

    Attributes:
        x: Normalised activations, ``[rows, d_in]``.
        b_dec: Vector that the encoder subtracts from them, ``[d_in]``.
        experts: Experts of each row, ``[rows, experts_per_row]``, int64.
        gates: Gates of these experts, likewise.
        shape: Leading dimensions of what is returned for each row, which multiply to their
            number; in one process those of the batch.
    """

    x: Float[torch.Tensor, "rows d_in"]
    b_dec: Float[torch.Tensor, " d_in"]
    experts: Int[torch.Tensor, "rows experts_per_row"]
    gates: Float[torch.Tensor, "rows experts_per_row"]
    shape: torch.Size

"""Dispatch of tokens to the experts that they selected."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Rows:
    """
    Rows with their experts: the input of everything after the router.

    Rows are the tokens of the batch, flattened. A subclass may give a token several rows,
    each with some of its experts; see :meth:`.MixtureEncoder.dispatch`.

    Attributes:
        x: Normalised activations, ``[rows, d_in]``.
        b_dec: Vector that the encoder subtracts from them, ``[d_in]``.
        experts: Experts of each row, by their place in the weights,
            ``[rows, experts_per_row]``, int64.
        gates: Gates of these experts, likewise.
        shape: Leading dimensions of results for each row; those of the batch, if rows are
            tokens.
    """

    x: Float[torch.Tensor, "rows d_in"]
    b_dec: Float[torch.Tensor, " d_in"]
    experts: Int[torch.Tensor, "rows experts_per_row"]
    gates: Float[torch.Tensor, "rows experts_per_row"]
    shape: torch.Size

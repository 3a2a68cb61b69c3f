"""Values that the stages of encoding hand on to each other."""

from typing import NamedTuple

import torch

from sae_lens_scale.ops import SparseLatents, SparsityPattern

from .dispatch import Rows
from .feature_scaling import ExpertScaling
from .routing import Routing
from .selection import Selected


class Inputs(NamedTuple):
    """
    Input of router and encoder.

    Attributes:
        x: The router's input, normalised, ``[..., d_in]``.
        b_dec: Decoder bias, which the encoder subtracts, ``[d_in]``; zeros without
            ``apply_b_dec_to_input``.
    """

    x: torch.Tensor
    b_dec: torch.Tensor


class AppliedEncoder(NamedTuple):
    """
    Encoder that rows are multiplied with, and norms that they are ranked with.

    Attributes:
        W_enc: Encoder vectors, ``[d_in, d_sae]``.
        omega: Feature scaling that the products get afterwards, ``[num_experts]``; None
            without.
        norms: Decoder norms that pre-activations are ranked with, ``[d_sae]``; None without.
    """

    W_enc: torch.Tensor
    omega: torch.Tensor | None
    norms: torch.Tensor | None


class Chosen(NamedTuple):
    """
    Candidates that tokens keep.

    Attributes:
        selected: Their positions, m for each row.
        products: Their products with the encoder, ``[rows, m]``.
        means: Mean product of each of the rows' experts, ``[rows, e]``; None without omega.
    """

    selected: Selected
    products: torch.Tensor
    means: torch.Tensor | None


class DecoderInput(NamedTuple):
    """
    Latents of each row that decode together.

    Attributes:
        coefficients: Multipliers of their decoder rows, ``[rows, m]``: feature activations,
            divided by decoder norms with rescale_acts_by_decoder_norm.
        pattern: The latents, for the sparse products.
    """

    coefficients: torch.Tensor
    pattern: SparsityPattern


class Encoding(NamedTuple):
    """
    Everything that encoding a batch computes, compactly.

    Attributes:
        routing: Experts and gates of each token.
        rows: Input of everything after the router.
        applied_W_enc: Encoder vectors that rows are multiplied with, ``[d_in, d_sae]``.
        scaling: Feature scaling of each row's experts; None without.
        all_pre_acts: Pre-activations of all candidates, before decoder norms,
            ``[rows, e, n]``; None unless asked for.
        latents: Surviving latents and their feature activations, ``[..., k]``; a row each.
        pre_acts: Their pre-activations before any gate, ``[..., k]``, times decoder norms
            if TopK ranks with these.
        survivors: The same latents for the decoder.
        runners_up: Latents next in rank for the decoder; None unless asked for.
    """

    routing: Routing
    rows: Rows
    applied_W_enc: torch.Tensor
    scaling: ExpertScaling | None
    all_pre_acts: torch.Tensor | None
    latents: SparseLatents
    pre_acts: torch.Tensor
    survivors: DecoderInput
    runners_up: DecoderInput | None

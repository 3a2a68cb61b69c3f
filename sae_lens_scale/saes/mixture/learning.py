"""Reconstructions that a training step learns from: survivors', runners-up's and dead latents'."""

from abc import ABC
from typing import NamedTuple

import torch

from sae_lens_scale.ops import (
    decoder_norm,
    grouped_decode,
    grouped_encode,
    index_select,
    lookup,
)

from .batch import BatchSAE
from .dead_latents import DeadLatents, find_dead, strongest_dead
from .dispatch import Rows
from .feature_scaling import ExpertScaling
from .selection import Candidates
from .stages import DecoderInput, Encoding
from .start import T_MIXTURE_TRAINING_CONFIG

# Of Gao et al. 2024, section 5.3.1.
MULTI_TOPK_FACTOR = 4


class LearningRecons(NamedTuple):
    """
    Sums of decoder rows, without bias, ``[..., d_out]``; None of latents that there are not.

    Attributes:
        survivors: By the latents that a token keeps.
        runners_up: By those next in rank, for the Multi-TopK loss.
        dead: By each token's strongest dead latents.
    """

    survivors: torch.Tensor | None = None
    runners_up: torch.Tensor | None = None
    dead: torch.Tensor | None = None


class DeadWeights(NamedTuple):
    """
    Weights of dead latents, as many of each expert, experts one after the other.

    Attributes:
        W_enc: Encoder vectors, ``[d_in, experts * most_dead]``.
        b_enc: Encoder biases, ``[experts, most_dead]``.
        W_dec: Decoder rows, ``[experts * most_dead, d_out]``.
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor


class LearningSAE(BatchSAE[T_MIXTURE_TRAINING_CONFIG], ABC):
    """Reconstruction by all latents that a training step learns from, which travel together."""

    @property
    def _num_runners_up(self) -> int:
        """Number of latents beyond k that a training step needs."""
        if not self.cfg.multi_topk_coefficient:
            return 0
        return (MULTI_TOPK_FACTOR - 1) * self._k

    @property
    def _most_dead(self) -> int:
        """Number of dead latents that a token may have in the dead-latent loss."""
        return max(1, self.W_dec.shape[-1] // 2)

    def _learning_recons(
        self,
        encoding: Encoding,
        dead: DeadLatents | None,
        survivors: DecoderInput | None = None,
    ) -> LearningRecons:
        """
        Reconstruct by runners-up, dead latents and, where they are given, survivors.

        Args:
            encoding: The batch's encoding.
            dead: The dead latents; None if none learn.
            survivors: Its survivors; None if somebody else decodes them.
        """
        partial: dict[str, torch.Tensor] = {}
        if survivors is not None:
            partial["survivors"] = self._partial_recons(survivors)
        if encoding.runners_up is not None:
            partial["runners_up"] = self._partial_recons(encoding.runners_up)
        if dead is not None and dead.most.read():
            partial["dead"] = self._partial_dead_recons(encoding, dead)
        recons = self._recons_of(encoding, list(partial.values()))
        return LearningRecons(**dict(zip(partial, recons, strict=True)))

    def _find_dead(self, mask: torch.Tensor | None) -> DeadLatents | None:
        """Dead latents, if there is a mask of them and a loss for them."""
        if mask is None or not self.cfg.aux_loss_coefficient:
            return None
        return find_dead(mask, self.cfg.num_experts, self.cfg.expert_size)

    def _held_offsets(self, dead: DeadLatents) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of dead latents in the experts whose weights this SAE holds."""
        # Of all experts, so that their number of positions does not depend on those held.
        offsets, is_dead = dead.offsets()
        return self._held(offsets), self._held(is_dead)

    def _partial_dead_recons(
        self, encoding: Encoding, dead: DeadLatents
    ) -> torch.Tensor:
        """
        Sum of the decoder rows of each token's strongest dead latents, ``[rows, d_out]``.

        Args:
            encoding: The batch's encoding.
            dead: The dead latents, of which there are some.

        Returns:
            The sum over those that each row has.
        """
        (offsets, is_dead), rows = self._held_offsets(dead), encoding.rows
        weights = self._dead_weights(encoding, offsets)
        if encoding.all_pre_acts is not None:
            pre_acts = encoding.all_pre_acts.gather(-1, offsets[rows.experts])
        else:
            pre_acts = self._dead_pre_acts(rows, encoding.scaling, weights)
        taken, selection = is_dead[rows.experts], self.selection()
        # A rule of each token alone leaves none out where there are no more than that.
        if not selection.per_token or pre_acts.shape[1:].numel() > self._most_dead:
            ranking = self._dead_ranking(rows, pre_acts, weights)
            taken = strongest_dead(ranking, taken, self._most_dead, selection)
        return self._decode_dead(rows, pre_acts, taken, weights)

    def _dead_weights(self, encoding: Encoding, offsets: torch.Tensor) -> DeadWeights:
        """Weights of the latents at positions of each expert, ``[experts, most_dead]``."""
        first = torch.arange(len(offsets), device=offsets.device) * self.cfg.expert_size
        latents = first.unsqueeze(-1) + offsets
        W_enc, W_dec = (
            index_select(weights, dim, latents.flatten(), self._gradient_memory)
            for weights, dim in ((encoding.applied_W_enc, 1), (self.W_dec, 0))
        )
        return DeadWeights(W_enc, lookup(self.b_enc, latents), W_dec)

    def _dead_pre_acts(
        self, rows: Rows, scaling: ExpertScaling | None, weights: DeadWeights
    ) -> torch.Tensor:
        """Pre-activations of the dead latents of each row's experts, ``[rows, e, most_dead]``."""
        # As in route: the gradient of b_dec comes from a term that is zero.
        b_dec = rows.b_dec.detach()
        products = grouped_encode(
            rows.x - b_dec, weights.W_enc, rows.experts, self.num_held_experts
        )
        shift = ((b_dec - rows.b_dec) @ weights.W_enc).view_as(weights.b_enc)
        dead = Candidates(
            products + lookup(shift, rows.experts),
            rows.experts,
            rows.gates,
            b_enc=weights.b_enc,
            norms=None,
            scaling=scaling,
        )
        return dead.pre_acts()

    def _dead_ranking(
        self, rows: Rows, pre_acts: torch.Tensor, weights: DeadWeights
    ) -> torch.Tensor:
        """Values that dead latents are ranked by, in the shape of their pre-activations."""
        ranking = pre_acts.detach()
        if self.cfg.rescale_acts_by_decoder_norm:
            norms = decoder_norm(weights.W_dec.detach()).view_as(weights.b_enc)
            ranking = ranking * norms[rows.experts]
        return ranking

    def _decode_dead(
        self,
        rows: Rows,
        pre_acts: torch.Tensor,
        taken: torch.Tensor,
        weights: DeadWeights,
    ) -> torch.Tensor:
        """Sum of the decoder rows of those dead latents that are taken, ``[rows, d_out]``."""
        gates = rows.gates.to(pre_acts.dtype).unsqueeze(-1)
        acts = torch.where(taken, pre_acts, 0) * gates
        return grouped_decode(acts, weights.W_dec, rows.experts, self.num_held_experts)

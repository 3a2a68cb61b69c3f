"""
The dead-latent loss: latents that stopped firing learn to explain the residual.

AuxK of Gao et al. 2024 (appendix A.2) for a mixture of experts. For each token, its best
dead candidates decode together, and are asked to reconstruct what the living latents left
over. Candidates are the dead latents of the experts that the token's router selected, and
no others: a latent of an expert that got no token has no part in the loss, and the loss
stays finite.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int

from sae_lens_scale.ops import HostNumber

from .selection import Selection


def dead_by_expert(
    dead_neuron_mask: Bool[torch.Tensor, " d_sae"], num_experts: int, expert_size: int
) -> Bool[torch.Tensor, "num_experts expert_size"]:
    """
    Split SAELens's mask of dead latents into experts.

    Args:
        dead_neuron_mask: True at dead latents, ``[d_sae]``.
        num_experts: Number of experts (N).
        expert_size: Latents of each.

    Returns:
        ``[num_experts, expert_size]``.

    Raises:
        ValueError: If the mask is not one of these latents: of another length, it would
            be split into other experts' latents.
    """
    shape, dtype = tuple(dead_neuron_mask.shape), dead_neuron_mask.dtype
    d_sae = num_experts * expert_size
    if shape != (d_sae,) or dtype != torch.bool:
        raise ValueError(
            f"dead_neuron_mask must have shape ({d_sae},) and dtype torch.bool, got "
            f"{shape} and {dtype}"
        )
    return dead_neuron_mask.view(num_experts, expert_size)


class DeadLatents(NamedTuple):
    """
    The dead latents of a training step.

    Attributes:
        mask: SAELens's mask of them, ``[d_sae]``.
        by_expert: True at dead latents, as :func:`dead_by_expert` returns them.
        most: Number of them in the expert that has most, by which the work is sized.
    """

    mask: Bool[torch.Tensor, " d_sae"]
    by_expert: Bool[torch.Tensor, "num_experts expert_size"]
    most: HostNumber

    def offsets(
        self,
    ) -> tuple[
        Int[torch.Tensor, "num_experts most_dead"],
        Bool[torch.Tensor, "num_experts most_dead"],
    ]:
        """
        Find the dead latents of each expert, as many positions for each.

        Returns:
            Their positions within the expert, and which of these positions hold one: rows
            are filled up with living latents, to as many as the most dead expert has.
        """
        # Stable: every expert's dead latents first, in their order.
        order = self.by_expert.int().argsort(dim=-1, descending=True, stable=True)
        offsets = order[:, : int(self.most.read())]
        return offsets, self.by_expert.gather(-1, offsets)


def find_dead(
    dead_neuron_mask: Bool[torch.Tensor, " d_sae"], num_experts: int, expert_size: int
) -> DeadLatents:
    """
    Find the dead latents of a training step; at its start, so that their number is on its
    way while the GPU encodes.

    Args:
        dead_neuron_mask: True at dead latents, ``[d_sae]``.
        num_experts: Number of experts (N).
        expert_size: Latents of each.

    Raises:
        ValueError: As :func:`dead_by_expert`.
    """
    by_expert = dead_by_expert(dead_neuron_mask, num_experts, expert_size)
    most = HostNumber(by_expert.sum(dim=-1).max())
    return DeadLatents(dead_neuron_mask, by_expert, most)


@torch.no_grad()
def strongest_dead(
    ranking: Float[torch.Tensor, "rows e most_dead"],
    is_dead: Bool[torch.Tensor, "rows e most_dead"],
    size: int,
    selection: Selection,
) -> Bool[torch.Tensor, "rows e most_dead"]:
    """
    Choose the dead candidates of each token that take part in the loss.

    Args:
        ranking: Values to rank candidates by, ``[rows, e, most_dead]``; see
            :meth:`DeadLatents.offsets`.
        is_dead: True at those that are dead, in the shape of ``ranking``.
        size: Number of candidates that a token may have.
        selection: Rule that chooses.

    Returns:
        Which candidates take part, likewise.
    """
    flat = ranking.masked_fill(~is_dead, -torch.inf).flatten(1)
    best = selection.select(flat, (size,))
    positions, candidates = best.positions, flat.shape[1]
    if best.mask is not None:
        # Beyond the last, to be cut off: a position that is masked may be one that is kept.
        positions = torch.where(best.mask, positions, candidates)
    chosen = flat.new_zeros(len(flat), candidates + 1, dtype=torch.bool)
    chosen = chosen.scatter_(1, positions, True)[:, :candidates]
    # A token with fewer dead candidates also drew living ones.
    return chosen.reshape(is_dead.shape) & is_dead


def dead_latent_loss(
    recons: Float[torch.Tensor, "tokens d_out"],
    residual: Float[torch.Tensor, "tokens d_out"],
    num_dead: Int[torch.Tensor, " tokens"],
    size: int,
) -> Float[torch.Tensor, " tokens"]:
    """
    Squared error of the dead latents' reconstruction of the residual.

    As in SAELens's TopK SAE, the loss is scaled down in proportion where there are fewer
    than ``size`` dead candidates. Their number differs from token to token here; with a
    single expert it does not, and the loss equals SAELens's.

    Args:
        recons: Reconstruction by each token's strongest dead candidates, ``[tokens, d_out]``.
        residual: Error that the living latents left, ``[tokens, d_out]``.
        num_dead: Dead latents among each token's candidates, ``[tokens]``.
        size: Number of candidates that a token may have.

    Returns:
        Squared error of each token, summed over d_out, ``[tokens]``.
    """
    scale = (num_dead.to(residual.dtype) / size).clamp(max=1)
    return scale * (recons - residual).pow(2).sum(dim=-1)

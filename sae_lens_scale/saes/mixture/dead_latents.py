"""The dead-latent loss: latents that stopped firing learn to explain the residual."""

import torch
from jaxtyping import Bool, Float, Int

from sae_lens_scale.ops import grouped_decode


def dead_offsets(
    dead_mask: Bool[torch.Tensor, " d_sae"], num_experts: int
) -> tuple[
    Int[torch.Tensor, "num_experts most_dead"],
    Bool[torch.Tensor, "num_experts most_dead"],
]:
    """
    The dead latents of each expert, as if they were experts of their own.

    Args:
        dead_mask: Which latents are dead, ``[d_sae]``.
        num_experts: Number of experts (N); divides d_sae.

    Returns:
        Their positions within the expert, and which of these positions hold one: rows
        are filled up with living latents, to as many as the most dead expert has.
    """
    by_expert = dead_mask.view(num_experts, -1)
    most = int(by_expert.sum(dim=-1).max())
    # Stable: every expert's dead latents first, in their order.
    offsets = by_expert.int().argsort(dim=-1, descending=True, stable=True)[:, :most]
    return offsets, by_expert.gather(-1, offsets)


def dead_latent_loss(
    pre_acts: Float[torch.Tensor, "tokens experts_per_token most_dead"],
    norms: Float[torch.Tensor, "tokens experts_per_token most_dead"] | None,
    is_dead: Bool[torch.Tensor, "tokens experts_per_token most_dead"],
    gates: Float[torch.Tensor, "tokens experts_per_token"],
    expert_indices: Int[torch.Tensor, "tokens experts_per_token"],
    residual: Float[torch.Tensor, "tokens d_in"],
    W_dec: Float[torch.Tensor, "num_experts_most_dead d_in"],
    num_experts: int,
) -> Float[torch.Tensor, ""]:
    """
    AuxK loss of Gao et al. 2024 (appendix A.2), for a mixture of experts.

    For each token, its best dead candidates decode together, and are asked to
    reconstruct what the living latents left over. Candidates are the dead latents of
    the experts that the token's router selected, and no others: a latent of an
    expert that got no token has no part in the loss, and the loss stays finite.

    As in SAELens's TopK SAE, up to ``d_in // 2`` candidates take part, and the loss
    is scaled down in proportion where there are fewer. How many there are differs
    from token to token here; with a single expert it does not, and the loss equals
    SAELens's.

    Args:
        pre_acts: Pre-activations of the candidates, as they multiply decoder rows,
            ``[tokens, experts_per_token, most_dead]``; see :func:`dead_offsets`.
        norms: What they are multiplied by before they are ranked, likewise.
        is_dead: Which of them are of dead latents, likewise.
        gates: Gates of the selected experts, ``[tokens, experts_per_token]``.
        expert_indices: Selected experts, ``[tokens, experts_per_token]``.
        residual: What the living latents left unexplained, ``[tokens, d_in]``.
        W_dec: Decoder rows of the dead latents, ``[num_experts * most_dead, d_in]``.
        num_experts: Number of experts (N).

    Returns:
        Squared error summed over d_in and averaged over tokens; a scalar.
    """
    k_aux = max(1, residual.shape[-1] // 2)
    taken = is_dead
    if pre_acts.shape[1:].numel() > k_aux:
        ranking = pre_acts if norms is None else pre_acts * norms
        ranking = ranking.detach().masked_fill(~is_dead, -torch.inf).flatten(-2)
        top = ranking.topk(k_aux, dim=-1, sorted=False).indices
        taken = torch.zeros_like(ranking, dtype=torch.bool).scatter_(-1, top, True)
        # A token with fewer dead candidates than k_aux also drew living ones.
        taken = taken.view_as(is_dead) & is_dead
    acts = torch.where(taken, pre_acts, 0) * gates.unsqueeze(-1)
    recons = grouped_decode(acts, W_dec, expert_indices, num_experts)
    available = is_dead.sum(dim=(-2, -1))
    scale = (available.to(residual.dtype) / k_aux).clamp(max=1)
    return (scale * (recons - residual).pow(2).sum(dim=-1)).mean()

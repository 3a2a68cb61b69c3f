"""The dead-latent loss: latents that stopped firing learn to explain the residual."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int

from sae_lens_scale.ops import grouped_decode


def dead_latent_loss(
    pre_acts: Float[torch.Tensor, "tokens experts_per_token expert_size"],
    gates: Float[torch.Tensor, "tokens experts_per_token"],
    expert_indices: Int[torch.Tensor, "tokens experts_per_token"],
    dead_mask: Bool[torch.Tensor, " d_sae"],
    residual: Float[torch.Tensor, "tokens d_in"],
    decoder: Float[torch.Tensor, "d_sae d_in"],
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
        pre_acts: Pre-activations of the selected experts' latents,
            ``[tokens, experts_per_token, expert_size]``.
        gates: Gates of the selected experts, ``[tokens, experts_per_token]``.
        expert_indices: Selected experts, ``[tokens, experts_per_token]``.
        dead_mask: Which latents are dead, ``[d_sae]``.
        residual: What the living latents left unexplained, ``[tokens, d_in]``.
        decoder: Decoder rows as the activations multiply them, ``[d_sae, d_in]``.
        num_experts: Number of experts; divides d_sae.

    Returns:
        Squared error summed over d_in and averaged over tokens; a scalar.
    """
    dead = rearrange(dead_mask, "(N n) -> N n", N=num_experts)[expert_indices]
    available = dead.sum(dim=(-2, -1))
    k_aux = max(1, residual.shape[-1] // 2)
    ranking = pre_acts.masked_fill(~dead, -torch.inf).flatten(-2)
    top = ranking.topk(min(k_aux, ranking.shape[-1]), dim=-1, sorted=False).indices
    taken = torch.zeros_like(ranking, dtype=torch.bool).scatter_(-1, top, True)
    # A token with fewer dead candidates than k_aux also drew living ones.
    taken = taken.view_as(dead) & dead
    acts = torch.where(taken, pre_acts, 0) * gates.unsqueeze(-1)
    recons = grouped_decode(acts, decoder, expert_indices, num_experts)
    scale = (available.to(residual.dtype) / k_aux).clamp(max=1)
    return (scale * (recons - residual).pow(2).sum(dim=-1)).mean()

"""Products with the weights of the selected experts only."""

import torch
from einops import rearrange
from jaxtyping import Float, Int


class _ExpertGroups:
    """The (token, slot) pairs of a batch, sorted by expert."""

    def __init__(self, expert_indices: torch.Tensor, num_experts: int):
        experts = expert_indices.flatten()
        # Stable, so that results do not depend on the sort's tie-breaking.
        self.order = experts.argsort(stable=True)
        self.sizes = torch.bincount(experts, minlength=num_experts).tolist()

    def multiply(
        self,
        rows: torch.Tensor,
        row_indices: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """
        Multiply rows by their experts' weights, in the order of the pairs.

        Args:
            rows: What the pairs' indices select from.
            row_indices: The row of each pair, sorted by expert.
            weights: One matrix for each expert.

        Returns:
            One product for each pair, in their original order.
        """
        # unbind, not slicing: its backward writes each expert's gradient once, where
        # every slice would allocate a full-size gradient of zeros.
        experts = weights.unbind()
        if not (
            torch.is_grad_enabled() and (rows.requires_grad or weights.requires_grad)
        ):
            out = rows.new_empty(len(row_indices), weights.shape[-1])
            pairs = self.order.split(self.sizes), row_indices.split(self.sizes)
            for here, i, w in zip(*pairs, experts, strict=True):
                out.index_copy_(0, here, (rows.index_select(0, i) @ w).to(out.dtype))
            return out
        # One selection: the backward of each writes a full-size gradient.
        groups = rows.index_select(0, row_indices).split(self.sizes)
        products = torch.cat([x @ w for x, w in zip(groups, experts, strict=True)])
        # Under autocast, products have another dtype than what they are products of.
        products = products.to(rows.dtype)
        inverse = torch.empty_like(self.order)
        inverse[self.order] = torch.arange(len(inverse), device=inverse.device)
        return products.index_select(0, inverse)


def grouped_encode(
    x: Float[torch.Tensor, "tokens d_in"],
    W_enc: Float[torch.Tensor, "d_in d_sae"],
    expert_indices: Int[torch.Tensor, "tokens experts_per_token"],
    num_experts: int,
) -> Float[torch.Tensor, "tokens experts_per_token expert_size"]:
    """
    Products ``x W_enc`` for the latents of each token's experts, without bias.

    Tokens are sorted by expert, so that each expert costs one matrix product
    over the tokens that selected it; an expert that got no token costs nothing.

    Args:
        x: Encoder input, ``[tokens, d_in]``.
        W_enc: Encoder weights, ``[d_in, d_sae]``; latent ``j`` belongs to expert
            ``j // (d_sae / num_experts)``.
        expert_indices: Selected experts, ``[tokens, experts_per_token]``.
        num_experts: Number of experts; divides d_sae.

    Returns:
        ``[tokens, experts_per_token, d_sae / num_experts]``.
    """
    groups = _ExpertGroups(expert_indices, num_experts)
    experts = rearrange(W_enc, "d (N n) -> N d n", N=num_experts)
    tokens = groups.order // expert_indices.shape[-1]
    return groups.multiply(x, tokens, experts).unflatten(0, expert_indices.shape)


def grouped_decode(
    acts: Float[torch.Tensor, "tokens experts_per_token expert_size"],
    W_dec: Float[torch.Tensor, "d_sae d_in"],
    expert_indices: Int[torch.Tensor, "tokens experts_per_token"],
    num_experts: int,
) -> Float[torch.Tensor, "tokens d_in"]:
    """
    Decode activations that are dense within each token's experts.

    The counterpart of :func:`grouped_encode`, for when so many of an expert's
    latents are active that a product beats gathering single rows.

    Args:
        acts: Activations of the selected experts' latents,
            ``[tokens, experts_per_token, d_sae / num_experts]``.
        W_dec: Decoder weights, ``[d_sae, d_in]``.
        expert_indices: Selected experts, ``[tokens, experts_per_token]``.
        num_experts: Number of experts; divides d_sae.

    Returns:
        The sum over experts of ``acts @ W_dec``, ``[tokens, d_in]``.
    """
    groups = _ExpertGroups(expert_indices, num_experts)
    experts = rearrange(W_dec, "(N n) d -> N n d", N=num_experts)
    out = groups.multiply(acts.flatten(0, 1), groups.order, experts)
    return out.unflatten(0, expert_indices.shape).sum(-2)

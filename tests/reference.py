"""
Oracle of the tests: mixture-of-experts SAEs, token by token from the formulas.

Slow and obvious on purpose, and differentiable. It imports none of the code that it
judges. Equations are those of the Scale SAE paper (Xu et al., "Beyond Redundancy:
Diverse and Specialized Multi-Expert Sparse Autoencoder").
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int


@dataclass
class ReferenceSAE:
    """
    Weights and settings of a mixture-of-experts SAE.

    Latent j belongs to expert ``j // (d_sae / num_experts)``. ``omega`` is None where
    there is no feature scaling; ``W_low_pass`` is used by the decomposition "learned"
    only. ``topk_over`` ranks latents by "activations" or by "gated_activations"; gates
    are the keys of ``select_experts``'s table.
    """

    W_enc: Float[torch.Tensor, "d_in d_sae"]
    b_enc: Float[torch.Tensor, " d_sae"]
    W_dec: Float[torch.Tensor, "d_sae d_in"]
    b_dec: Float[torch.Tensor, " d_in"]
    W_router: Float[torch.Tensor, "d_in num_experts"]
    b_router: Float[torch.Tensor, " d_in"]
    k: int
    experts_per_token: int
    gate: str
    topk_over: str
    rescale_acts_by_decoder_norm: bool
    apply_b_dec_to_input: bool
    omega: Float[torch.Tensor, " num_experts"] | None = None
    decomposition: str = "mean"
    W_low_pass: Float[torch.Tensor, "d_in d_in"] | None = None
    num_shared_experts: int = 0

    @property
    def num_experts(self) -> int:
        return self.W_router.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    @property
    def expert_size(self) -> int:
        return self.d_sae // self.num_experts


def low_pass(
    M: Float[torch.Tensor, "expert_size d_in"],
    decomposition: str,
    W_low_pass: Float[torch.Tensor, "d_in d_in"] | None,
) -> Float[torch.Tensor, "expert_size d_in"]:
    """Low-pass part of one expert's encoder matrix (Appendix C.1)."""
    if decomposition == "identity":
        return torch.eye(*M.shape, dtype=M.dtype, device=M.device)
    row = sum((M[i] for i in range(M.shape[0])), torch.zeros_like(M[0])) / M.shape[0]
    if decomposition == "learned":
        assert W_low_pass is not None
        row = W_low_pass @ row
    return torch.stack([row for _ in range(M.shape[0])])


def effective_encoder(sae: ReferenceSAE) -> Float[torch.Tensor, "d_in d_sae"]:
    """Scaled encoder, expert by expert: equation 2.5, or C.1 to C.3 where not "mean"."""
    if sae.omega is None:
        return sae.W_enc
    experts = []
    for i in range(sae.num_experts):
        rows = slice(i * sae.expert_size, (i + 1) * sae.expert_size)
        M = sae.W_enc[:, rows].T
        low = low_pass(M, sae.decomposition, sae.W_low_pass)
        experts.append((low + (1 + sae.omega[i]) * (M - low)).T)
    return torch.cat(experts, dim=1)


def router_probabilities(
    sae: ReferenceSAE, x: Float[torch.Tensor, " d_in"]
) -> Float[torch.Tensor, " num_experts"]:
    """Routing ``softmax(W_router (x - b_router))``, section 2.2.1; 0 if shared."""
    logits = (x - sae.b_router) @ sae.W_router
    exponentials = torch.exp(logits - logits.max())
    is_routed = torch.arange(sae.num_experts) >= sae.num_shared_experts
    exponentials = exponentials * is_routed
    return exponentials / exponentials.sum()


def select_experts(
    sae: ReferenceSAE, p: Float[torch.Tensor, " num_experts"]
) -> tuple[list[int], list[torch.Tensor]]:
    """
    Experts of one token and their gates.

    Shared experts come first, with gate 1, then the most probable others, strongest first.
    """
    shared = list(range(sae.num_shared_experts))
    num_routed = sae.experts_per_token - len(shared)
    routed = range(len(shared), sae.num_experts)
    selected = sorted(routed, key=lambda i: -p[i].item())[:num_routed]
    total = sum(p[i] for i in selected)
    exp_total = sum(torch.exp(p[i]) for i in selected)
    gates = {
        "softmax": [p[i] for i in selected],
        "renormalized": [p[i] / total for i in selected],
        "rescaled": [num_routed * p[i] / total for i in selected],
        "double_softmax": [torch.exp(p[i]) / exp_total for i in selected],
        "uniform": [torch.ones_like(p[i]) for i in selected],
    }
    return shared + selected, [p.new_ones(()) for _ in shared] + gates[sae.gate]


def candidates(
    sae: ReferenceSAE, x: Float[torch.Tensor, " d_in"], selected: list[int]
) -> dict[int, torch.Tensor]:
    """Pre-activations of all latents of the selected experts: TopK's candidates."""
    sae_in = x - sae.b_dec if sae.apply_b_dec_to_input else x
    W_hat = effective_encoder(sae)
    result = {}
    for i in selected:
        for j in range(i * sae.expert_size, (i + 1) * sae.expert_size):
            h = sae_in @ W_hat[:, j] + sae.b_enc[j]
            if sae.rescale_acts_by_decoder_norm:
                h = h * sae.W_dec[j].norm()
            result[j] = h
    return result


def encode_token(
    sae: ReferenceSAE, x: Float[torch.Tensor, " d_in"]
) -> Float[torch.Tensor, " d_sae"]:
    """Feature activations of one token: equation 2.3, ReLU, then the gate of 2.4."""
    selected, gates = select_experts(sae, router_probabilities(sae, x))
    gate_of = dict(zip(selected, gates, strict=True))
    pre_acts = candidates(sae, x, selected)
    ranking = {
        j: h.item() * gate_of[j // sae.expert_size].item()
        if sae.topk_over == "gated_activations"
        else h.item()
        for j, h in pre_acts.items()
    }
    kept = sorted(ranking, key=lambda j: -ranking[j])[: sae.k]
    acts = [torch.zeros_like(sae.b_enc[0]) for _ in range(sae.d_sae)]
    for j in kept:
        acts[j] = gate_of[j // sae.expert_size] * torch.relu(pre_acts[j])
    return torch.stack(acts)


def encode(
    sae: ReferenceSAE, x: Float[torch.Tensor, "*batch d_in"]
) -> Float[torch.Tensor, "*batch d_sae"]:
    """Feature activations of any batch, one token after the other."""
    flat = x.reshape(-1, x.shape[-1])
    acts = torch.stack([encode_token(sae, token) for token in flat])
    return acts.reshape(*x.shape[:-1], sae.d_sae)


def decode(
    sae: ReferenceSAE, acts: Float[torch.Tensor, "*batch d_sae"]
) -> Float[torch.Tensor, "*batch d_in"]:
    """Reconstruction by equation 2.4, gates being in the activations, plus b_dec."""
    directions = sae.W_dec
    if sae.rescale_acts_by_decoder_norm:
        directions = torch.stack([row / row.norm() for row in sae.W_dec])
    return acts @ directions + sae.b_dec


def mse_loss(sae: ReferenceSAE, x: Float[torch.Tensor, "tokens d_in"]) -> torch.Tensor:
    """Squared error, summed over d_in and averaged over tokens (equation 2.2)."""
    errors = decode(sae, encode(sae, x)) - x
    return sum(((error**2).sum() for error in errors), x.new_zeros(())) / len(x)


def multi_topk_loss(
    sae: ReferenceSAE, x: Float[torch.Tensor, "tokens d_in"]
) -> torch.Tensor:
    """Squared error with 4 k latents: Multi-TopK, Gao et al. 2024, section 5.3.1."""
    return mse_loss(replace(sae, k=4 * sae.k), x)


def load_balance_loss(
    sae: ReferenceSAE, x: Float[torch.Tensor, "tokens d_in"]
) -> torch.Tensor:
    """Balance loss ``N * sum_i f_i P_i`` of equation 2.2, over all routed experts."""
    p = [router_probabilities(sae, token) for token in x]
    chosen = [select_experts(sae, token_p)[0] for token_p in p]
    total = x.new_zeros(())
    num_routed = sae.experts_per_token - sae.num_shared_experts
    for i in range(sae.num_shared_experts, sae.num_experts):
        f = sum(i in experts for experts in chosen) / (len(x) * num_routed)
        P = sum(token_p[i] for token_p in p) / len(x)
        total = total + f * P
    return (sae.num_experts - sae.num_shared_experts) * total


def dead_latent_loss(
    sae: ReferenceSAE,
    x: Float[torch.Tensor, "tokens d_in"],
    dead: set[int],
) -> torch.Tensor:
    """
    Loss AuxK (Gao et al. 2024, appendix A.2) through the experts that each token selected.

    The residual is a constant. A token's d_in // 2 strongest dead candidates decode
    together; its error counts in proportion to how many of those d_in // 2 it has.
    """
    k_aux = x.shape[-1] // 2
    residuals = (x - decode(sae, encode(sae, x))).detach()
    total = x.new_zeros(())
    for token, residual in zip(x, residuals, strict=True):
        selected, gates = select_experts(sae, router_probabilities(sae, token))
        gate_of = dict(zip(selected, gates, strict=True))
        pool = {j: h for j, h in candidates(sae, token, selected).items() if j in dead}
        strongest = sorted(pool, key=lambda j: -pool[j].item())[:k_aux]
        recons = torch.zeros_like(residual)
        for j in strongest:
            row = sae.W_dec[j]
            if sae.rescale_acts_by_decoder_norm:
                row = row / row.norm()
            recons = recons + gate_of[j // sae.expert_size] * pool[j] * row
        scale = min(len(pool) / k_aux, 1.0)
        total = total + scale * ((recons - residual) ** 2).sum()
    return total / len(x)


def decode_selected(
    values: Float[torch.Tensor, "tokens k"],
    weights: Float[torch.Tensor, "num_latents width"],
    indices: Int[torch.Tensor, "tokens k"],
) -> Float[torch.Tensor, "tokens width"]:
    """Sums ``out[t] = sum_i values[t, i] weights[indices[t, i]]``."""
    out = [weights.new_zeros(weights.shape[1]) for _ in range(len(values))]
    for t, i in _pairs(indices):
        out[t] = out[t] + values[t, i] * weights[indices[t, i]]
    return torch.stack(out) if out else weights.new_zeros(0, weights.shape[1])


def sample_products(
    rows: Float[torch.Tensor, "tokens width"],
    weights: Float[torch.Tensor, "num_latents width"],
    indices: Int[torch.Tensor, "tokens k"],
) -> Float[torch.Tensor, "tokens k"]:
    """Products ``out[t, i] = rows[t] . weights[indices[t, i]]``."""
    products = [(rows[t] * weights[indices[t, i]]).sum() for t, i in _pairs(indices)]
    flat = torch.stack(products) if products else rows.new_zeros(0)
    return flat.reshape(indices.shape)


def sum_by_latent(
    values: Float[torch.Tensor, "tokens k"],
    rows: Float[torch.Tensor, "tokens width"],
    indices: Int[torch.Tensor, "tokens k"],
    num_latents: int,
) -> Float[torch.Tensor, "num_latents width"]:
    """Sums ``out[j] = sum of values[t, i] rows[t] over all indices[t, i] = j``."""
    out = [rows.new_zeros(rows.shape[1]) for _ in range(num_latents)]
    for t, i in _pairs(indices):
        j = int(indices[t, i])
        out[j] = out[j] + values[t, i] * rows[t]
    return torch.stack(out)


def _pairs(indices: torch.Tensor) -> list[tuple[int, int]]:
    return [(t, i) for t in range(indices.shape[0]) for i in range(indices.shape[1])]

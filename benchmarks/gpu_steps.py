"""
Correctness of whole training steps on a GPU, against dense formulas in float64.

The formulas are given the experts and latents that the step selected, since rounding moves a token
that is near a boundary; that these are the best but for rounding is a check of its own. An error
is that of a whole tensor, relative to its norm (or, of a gradient that is small beside the others',
to a hundredth of all their norm).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from entries import Placement, placement
from gpu_checks import bound
from gpu_settings import Args, Precision
from processes import Item
from sae_lens.saes.sae import TrainStepInput
from typing_extensions import override

from sae_lens_scale import (
    ScaleTrainingSAE,
    ScaleTrainingSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
)
from sae_lens_scale.saes.mixture import MixtureTrainingSAEConfig
from sae_lens_scale.saes.mixture.selection import Selected, Selection

Parameters = dict[str, torch.Tensor]

# A step's results go through several products.
_PRODUCTS = 4
# Norm of a gradient that errors are relative to, at least, by the norm of all.
_LEAST = 0.01


def _recording(rule: Selection, selected: list[torch.Tensor]) -> Selection:
    """The same rule, which adds the positions that it finds to a list."""

    def select(ranking: torch.Tensor, sizes: Sequence[int]) -> Selected:
        found = rule.select(ranking, sizes)
        selected.append(found.positions)
        return found

    return replace(rule, select=select)


class RecordingScaleSAE(ScaleTrainingSAE):
    """A Scale SAE that keeps what it selected."""

    @override
    def selection(self) -> Selection:
        self.selected: list[torch.Tensor]
        return _recording(super().selection(), self.selected)


class RecordingSwitchSAE(SwitchTrainingSAE):
    """A Switch SAE that keeps what it selected."""

    @override
    def selection(self) -> Selection:
        self.selected: list[torch.Tensor]
        return _recording(super().selection(), self.selected)


@dataclass(frozen=True)
class Step:
    """
    A training step.

    Args:
        config: Config of the SAE, without device and dtype.
        tokens: Tokens of its batch.
        dead: Share of the latents that count as dead.
        ties: Whether latents come in pairs that are equal.
    """

    config: dict[str, Any]
    tokens: int
    dead: float = 0.0
    ties: bool = False

    def make(self, place: Placement) -> RecordingScaleSAE | RecordingSwitchSAE:
        """An SAE whose parameters are all random."""
        config = {
            "initialize_from_activations": False,
            "device": place.device,
            "dtype": place.dtype,
            "multi_topk_coefficient": 0.0,
            **self.config,
        }
        if place.dtype == "bfloat16":
            # The default's small steps would be lost to rounding, as a warning says.
            config["router_lr_factor"] = 1.0
        if "experts_per_token" in config:
            sae = RecordingScaleSAE(ScaleTrainingSAEConfig(**config))
        else:
            sae = RecordingSwitchSAE(SwitchTrainingSAEConfig(**config))
        for parameter in sae.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        if self.ties:
            sae.W_enc.data[:, 1::2] = sae.W_enc.data[:, :-1:2]
            sae.b_enc.data[1::2] = sae.b_enc.data[:-1:2]
        return sae


def steps(args: Args, precision: Precision) -> dict[str, Step]:
    """Steps of the paper's SAEs, and small ones with odd sizes."""
    # Of more dead latents than d_in / 2 the best are chosen, by the formulas anew: rounding to
    # fewer digits would choose others.
    most, some = (0.9, 0.3) if precision == "float32" else (0.2, 0.1)
    sizes = {"d_in": args.d_in, "d_sae": args.d_sae, "k": args.k}
    tokens, n, few = (2, 4, 3) if args.quick else (512, 64, 37)
    multi = {"multi_topk_coefficient": 0.125}
    odd = {"d_in": 33, "d_sae": 5 * 18, "num_experts": 5, "k": 3, **multi}
    two = {"num_experts": n, "experts_per_token": 2}
    eight = {"num_experts": n, "experts_per_token": min(n, 8)}
    many = {"num_experts": 4 * n, "experts_per_token": 8, **multi}
    one = {"num_experts": n // 2}
    single = {"num_experts": 1, "experts_per_token": 1}
    return {
        f"scale {n}/2": Step(sizes | two, tokens),
        f"scale {n}/{eight['experts_per_token']}": Step(sizes | eight, tokens),
        f"scale {4 * n}/8, Multi-TopK, dead": Step(sizes | many, tokens, dead=0.05),
        f"switch {n // 2}": Step(sizes | one, tokens),
        "odd sizes, many dead, ties": Step(
            odd | {"experts_per_token": 2}, few, dead=most, ties=True
        ),
        "one expert": Step(odd | single, few, some),
        "one token": Step(odd | {"experts_per_token": 3}, 1, some),
    }


def check_steps(args: Args, precision: Precision) -> Iterator[Item]:
    """Items: a step each, of its selections, losses and gradients."""
    place = placement(precision, args.device)
    for name, step in steps(args, precision).items():
        yield name, partial(_check_step, step, precision, place)


def _check_step(step: Step, precision: Precision, place: Placement) -> dict[str, Any]:
    torch.manual_seed(0)
    sae = step.make(place)
    cfg = sae.cfg
    x = place.randn(step.tokens, cfg.d_in)
    dead = torch.rand(cfg.d_sae, device=x.device) < step.dead
    chosen: list[torch.Tensor] = []

    def keep(_: Any, __: Any, indices: Any) -> None:
        chosen.append(indices)

    sae.hook_expert_indices.register_forward_hook(keep)
    sae.selected = []
    with place.autocasting():
        output = sae.training_forward_pass(
            TrainStepInput(
                sae_in=x,
                coefficients={},
                dead_neuron_mask=dead,
                n_training_steps=0,
                is_logging_step=False,
            )
        )
    output.loss.backward()
    experts = chosen[0]
    positions = _of_all_tokens(sae.selected, step.tokens)
    latents = (
        experts.gather(1, positions // cfg.expert_size) * cfg.expert_size
        + positions % cfg.expert_size
    )
    parameters = {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in sae.named_parameters()
    }
    exact = reference(cfg, parameters, x.double(), experts, latents, dead)
    torch.stack(list(exact.losses.values())).sum().backward()
    if output.losses.keys() != exact.losses.keys():
        raise ValueError(f"losses must be {[*exact.losses]}, got {[*output.losses]}")
    errors = {"reconstruction": _relative(output.sae_out, exact.reconstruction)}
    for name, loss in exact.losses.items():
        errors[name] = _relative(output.losses[name], loss)
    got, want = (
        {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in parameters_
        }
        for parameters_ in (sae.named_parameters(), parameters.items())
    )
    # Of a gradient that the tokens' parts nearly cancel in, rounding leaves nothing.
    floor = _LEAST * torch.stack([grad.norm() for grad in want.values()]).norm().item()
    for name in want:
        errors[f"gradient of {name}"] = _relative(got[name], want[name], floor)
    terms = max(cfg.d_sae, step.tokens)
    return {
        "checks": [
            {
                "check": name,
                "error": error,
                "bound": _PRODUCTS * bound(precision, terms),
            }
            for name, error in (errors | exact.missed).items()
        ]
    }


def _of_all_tokens(selected: list[torch.Tensor], tokens: int) -> torch.Tensor:
    """The first selection of each token: others are of dead latents; ``[tokens, m]``."""
    first: list[torch.Tensor] = []
    while sum(map(len, first)) < tokens:
        first.append(selected[len(first)])
    return torch.cat(first)


def _relative(got: torch.Tensor, want: torch.Tensor, floor: float = 0.0) -> float:
    error, norm = (got.detach().double() - want.detach()).norm(), want.detach().norm()
    if error == 0:
        return 0.0
    return (error / norm.clamp(min=floor)).nan_to_num(torch.inf).item()


@dataclass
class Exact:
    """
    A training step in float64.

    Attributes:
        losses: Those of the step, by name.
        reconstruction: ``[tokens, d_in]``.
        missed: Largest excess of the best that was not selected over the worst that was, relative
            to the token's largest value; by name.
    """

    losses: dict[str, torch.Tensor]
    reconstruction: torch.Tensor
    missed: dict[str, float]


def reference(
    cfg: MixtureTrainingSAEConfig,
    parameters: Parameters,
    x: torch.Tensor,
    experts: torch.Tensor,
    latents: torch.Tensor,
    dead: torch.Tensor,
) -> Exact:
    """
    Compute a step with d_sae-wide tensors: section 2 of the Scale SAE paper.

    Args:
        cfg: Config of the SAE; its gates are "rescaled" or "uniform".
        parameters: Parameters of the SAE, by name, float64.
        x: The batch, ``[tokens, d_in]``.
        experts: Experts of each token, shared ones first, ``[tokens, experts_per_token]``.
        latents: Latents of each token, best first if there are more than k, ``[tokens, m]``.
        dead: True at dead latents, ``[d_sae]``.
    """
    p, tokens, n = parameters, len(x), cfg.expert_size
    shared, factor = cfg.num_shared_experts, cfg.router_lr_factor
    routed = cfg.num_experts - shared
    logits = (x - factor * p["b_router"]) @ (factor * p["W_router"])[:, shared:]
    probabilities, chosen = logits.softmax(-1), experts[:, shared:] - shared
    gate = torch.ones_like(chosen, dtype=x.dtype)
    if cfg.gate == "rescaled":
        gate = probabilities.gather(1, chosen)
        gate = gate / gate.sum(-1, keepdim=True) * chosen.shape[1]
    gates = torch.zeros_like(logits).scatter(1, chosen, gate)
    gates = torch.cat([x.new_ones(tokens, shared), gates], dim=1)
    gates = gates.repeat_interleave(n, dim=1)
    is_chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
    of_experts = torch.cat([is_chosen.new_ones(tokens, shared), is_chosen], dim=1)
    candidates = of_experts.repeat_interleave(n, dim=1)

    W_enc = p["W_enc"].unflatten(1, (cfg.num_experts, n))
    if "omega" in p:
        low = W_enc.mean(dim=-1, keepdim=True)
        W_enc = low + (1 + p["omega"]).unsqueeze(-1) * (W_enc - low)
    b_dec = p["b_dec"] if cfg.apply_b_dec_to_input else 0
    pre_acts = (x - b_dec) @ W_enc.flatten(1) + p["b_enc"]

    def decode(kept: torch.Tensor, acts: torch.Tensor) -> torch.Tensor:
        return (torch.where(kept, acts, 0) * gates) @ p["W_dec"]

    def kept(latents: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(candidates).scatter(1, latents, True)

    def squared(error: torch.Tensor) -> torch.Tensor:
        return error.square().sum(-1)

    ranking = pre_acts.detach()
    if cfg.rescale_acts_by_decoder_norm:
        ranking = ranking * p["W_dec"].detach().norm(dim=-1)
    gated = (
        ranking * gates.detach() if cfg.topk_over == "gated_activations" else ranking
    )
    survivors = kept(latents[:, : cfg.k])
    missed = {
        "experts missed": _missed(logits.detach(), is_chosen, is_chosen | True),
        "latents missed": _missed(gated, survivors, candidates),
    }
    recons = decode(survivors, pre_acts.relu()) + p["b_dec"]
    losses = {"mse_loss": squared(recons - x).mean()}
    if cfg.load_balance_coefficient:
        load = is_chosen.to(x.dtype).mean(0) / chosen.shape[1]
        balance = routed * (load * probabilities.mean(0)).sum()
        losses["load_balance_loss"] = cfg.load_balance_coefficient * cfg.d_in * balance
    if cfg.aux_loss_coefficient:
        losses["auxiliary_reconstruction_loss"] = x.new_zeros(())
    if cfg.aux_loss_coefficient and dead.any():
        size = max(1, cfg.d_in // 2)
        there = candidates & dead
        best = ranking.masked_fill(~there, -torch.inf)
        best = kept(best.topk(min(size, cfg.d_sae)).indices) & there
        scale = (there.sum(-1) / size).clamp(max=1)
        errors = scale * squared(decode(best, pre_acts) - (x - recons).detach())
        losses["auxiliary_reconstruction_loss"] = (
            cfg.aux_loss_coefficient * errors.mean()
        )
    if cfg.multi_topk_coefficient:
        wider = kept(latents)
        missed["runners-up missed"] = _missed(gated, wider, candidates)
        wide = decode(wider, pre_acts.relu()) + p["b_dec"]
        losses["multi_topk_loss"] = (
            cfg.multi_topk_coefficient * squared(wide - x).mean()
        )
    return Exact(losses, recons, missed)


def _missed(
    ranking: torch.Tensor, selected: torch.Tensor, candidates: torch.Tensor
) -> float:
    """Largest excess of the best that was left out over the worst that was selected; 0 if none."""
    if not (selected <= candidates).all():
        return torch.inf
    worst = ranking.masked_fill(~selected, torch.inf).amin(-1)
    best = ranking.masked_fill(selected | ~candidates, -torch.inf).amax(-1)
    scale = ranking.masked_fill(~candidates, 0).abs().amax(-1)
    return ((best - worst).clamp(min=0) / scale).max().item()

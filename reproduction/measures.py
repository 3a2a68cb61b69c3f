"""Measures of every SAE of a grid."""

from dataclasses import asdict
from typing import Any

import torch
from sae_lens.saes.sae import SAE
from sae_lens.training.activation_scaler import ActivationScaler

from sae_lens_scale.analysis.experts import (
    expert_coactivation,
    expert_similarity,
    expert_usage,
    scaling_factors,
)
from sae_lens_scale.analysis.redundancy import feature_redundancy
from sae_lens_scale.analysis.similarity import (
    activation_similarity,
    active_latents,
    overlap_histogram,
)
from sae_lens_scale.saes.mixture import MixtureSAE

from .activations import Activations

_BATCH = 1024
# Tokens among which all pairs are compared.
_SIMILARITY_TOKENS = 8192


@torch.no_grad()
def reconstruction_error(
    sae: SAE[Any],
    activations: Activations,
    scaler: ActivationScaler | None = None,
    batch_size: int = _BATCH,
) -> dict[str, float]:
    """
    Measure the error of an SAE's reconstruction.

    Args:
        activations: Raw activations.
        scaler: The trainer's, for an SAE in training.

    Returns:
        ``mse`` (squared error, summed over d_in, mean over tokens, in the activations' own
        units) and ``fvu`` (that, divided by their variance).

    Raises:
        ValueError: If all tokens are the same.
    """
    scaler = scaler or ActivationScaler()
    total = variance(activations)
    if not total > 0:
        raise ValueError("activations must differ from token to token, to be explained")
    error = torch.zeros((), dtype=torch.float64)
    for batch in activations.batches(batch_size):
        batch = batch.to(sae.device)
        output = scaler.unscale(sae(scaler.scale(batch)))
        error += (output - batch).square().sum(dim=-1).sum(dtype=torch.float64).cpu()
    mse = error.item() / len(activations)
    return {"mse": mse, "fvu": mse / total}


@torch.no_grad()
def variance(activations: Activations) -> float:
    """Compute the variance of activations, summed over d_in: the mse at which fvu is 1."""
    total: Any = 0
    squares: Any = 0
    for batch in activations.batches(_BATCH):
        exact = batch.double()
        total += exact.sum(dim=0)
        squares += exact.square().sum()
    around_mean = squares - total.square().sum() / len(activations)
    return around_mean.item() / len(activations)


@torch.no_grad()
def firing_counts(sae: SAE[Any], activations: Activations) -> torch.Tensor:
    """Count the tokens on which each latent fires: ``[d_sae]``, int64."""
    counts = torch.zeros(sae.cfg.d_sae, dtype=torch.long, device=sae.device)
    for _, latents in active_latents(sae, activations.batches(_BATCH)):
        counts += latents.bincount(minlength=sae.cfg.d_sae)
    return counts


def reconstruction(
    sae: SAE[Any], activations: Activations, counts: torch.Tensor
) -> dict[str, float]:
    """
    Measure how well an SAE reconstructs activations, and with how many latents, as in a record's
    ``in_domain``; ``counts`` are the :func:`firing_counts`.
    """
    error = reconstruction_error(sae, activations)
    return {
        **error,
        "explained_variance": 1 - error["fvu"],
        "l0": counts.sum().item() / len(activations),
        "alive": (counts > 0).double().mean().item(),
        "tokens": len(activations),
    }


def further_measures(
    sae: SAE[Any], activations: Activations, counts: torch.Tensor
) -> dict[str, Any]:
    """
    Measure what figures show of an SAE besides its reconstruction.

    Returns:
        Results by name, that JSON can hold. Those that need latents that fire are left out
        for a collapsed SAE.
    """
    drawn = activations.sample(_SIMILARITY_TOKENS)
    sample = drawn.split(_BATCH)
    num_experts = sae.cfg.num_experts if isinstance(sae, MixtureSAE) else 1
    alive = counts > 0
    redundancy = feature_redundancy(
        sae.W_dec, alive=alive if alive.sum() > 1 else None, num_experts=num_experts
    )
    measures: dict[str, Any] = {
        "redundancy": asdict(redundancy),
        "overlap_histogram": asdict(overlap_histogram(sae, sample)),
    }
    # Without a k, similarity is relative to the mean L0: a collapsed SAE has none.
    if hasattr(sae.cfg, "k") or firing_counts(sae, Activations([drawn])).any():
        similarity = activation_similarity(sae, sample)
        measures["activation_similarity"] = asdict(similarity)
    if isinstance(sae, MixtureSAE) and num_experts > 1:
        usage = expert_usage(sae, activations.batches(_BATCH))
        measures["expert_usage"] = asdict(usage)
        _, pairs = expert_coactivation(sae, activations.batches(_BATCH))
        measures["expert_coactivation"] = _scalars(pairs)
        measures["expert_similarity"] = _scalars(expert_similarity(sae))
    if sae.cfg.metadata.omega:
        measures["scaling_factors"] = scaling_factors(sae)
    return measures


def _scalars(result: Any) -> dict[str, Any]:
    """A result without its lists, which have an entry for each expert or pair of them."""
    return {n: x for n, x in asdict(result).items() if not isinstance(x, list)}

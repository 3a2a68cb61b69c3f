"""Reconstruction: how much an SAE explains, with how many latents, and what it costs the model."""

from typing import Any

import torch
from sae_lens import SAE
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_scale.analysis.redundancy import feature_redundancy


def reconstruction_scores(
    model: Any,
    sae: SAE[Any],
    store: ActivationsStore,
    batches: int,
    batch_size_prompts: int,
) -> dict[str, float | None]:
    """
    Run SAELens's evaluation, and measure the redundancy of the latents that fire in it.

    Args:
        model: The language model, as SAELens loads it.
        sae: The SAE, for inference.
        store: Text, read from where the store stands: the first batches for the loss, as
            many for all else.
        batches: Number of batches.
        batch_size_prompts: Prompts of a batch.

    Returns:
        ``fvu`` (fraction of variance unexplained: squared error divided by the variance of
        activations around their mean), ``loss_recovered`` (SAELens's ``ce_loss_score``),
        ``l0``, ``alive`` (share of latents that fire at all on these tokens) and
        ``redundancy`` (share of these that have a cosine above 0.9 with another of these;
        None for fewer than two).
    """
    exclude = sae.cfg.metadata.exclude_special_tokens
    metrics, by_latent = run_evals(
        sae,
        store,
        model,
        ActivationScaler(),
        EvalConfig(
            batch_size_prompts=batch_size_prompts,
            n_eval_reconstruction_batches=batches,
            n_eval_sparsity_variance_batches=batches,
            compute_ce_loss=True,
            compute_variance_metrics=True,
            compute_sparsity_metrics=True,
            compute_featurewise_density_statistics=True,
        ),
        exclude_special_tokens=True if exclude is None else exclude,
        verbose=True,
    )
    fires = torch.tensor(by_latent["feature_density"]) > 0
    redundancy = None
    if fires.sum() > 1:
        redundancy = feature_redundancy(sae.W_dec, alive=fires).alive
    return {
        "fvu": 1 - metrics["reconstruction_quality"]["explained_variance"],
        "loss_recovered": metrics["model_performance_preservation"]["ce_loss_score"],
        "l0": metrics["sparsity"]["l0"],
        "alive": fires.double().mean().item(),
        "redundancy": None if redundancy is None else redundancy.share_above,
    }

"""Scores on synthetic data, whose true features are known."""

from typing import Any

import torch
from sae_lens import SAE
from sae_lens.synthetic import SyntheticModel, eval_sae_on_synthetic_data
from sae_lens.util import cosine_similarities

_RECOVERED = 0.9


@torch.no_grad()
def synthetic_scores(
    sae: SAE[Any],
    model: SyntheticModel,
    num_samples: int = 100_000,
    batch_size: int = 1024,
) -> dict[str, float]:
    """
    Run SAELens's evaluation on synthetic data, and count the true features that were found.

    Args:
        sae: The SAE, for inference, trained on samples of the model.
        model: The synthetic model: SAELens's, or SynthSAEBench-16k.
        num_samples: Number of samples.
        batch_size: Samples at a time.

    Returns:
        ``fvu``, ``l0``, ``alive`` (share of latents that fire at all), ``true_l0``;
        ``recovered`` (share of true features with a latent whose decoder direction has a
        cosine above 0.9 with theirs, either sign), ``mcc`` (mean absolute cosine of the
        best one-to-one matching), ``uniqueness`` (true features that are some latent's
        nearest one, per latent); and of latents as detectors of their nearest true
        feature, ``precision``, ``recall`` and ``f1``, means over all latents.

    Raises:
        ValueError: If the SAE is of another width than the samples.
    """
    features = model.feature_dict.feature_vectors
    if sae.cfg.d_in != features.shape[1]:
        raise ValueError(
            f"d_in of the SAE must be {features.shape[1]}, the synthetic model's "
            f"hidden_dim, got {sae.cfg.d_in}"
        )
    found = eval_sae_on_synthetic_data(
        sae,
        model.feature_dict,
        model.activation_generator,
        num_samples=num_samples,
        batch_size=batch_size,
    )
    nearest = cosine_similarities(features, sae.W_dec).abs().amax(dim=1)
    return {
        "fvu": 1 - found.explained_variance,
        "l0": found.sae_l0,
        "alive": 1 - found.dead_latents / len(sae.W_dec),
        "true_l0": found.true_l0,
        "recovered": (nearest > _RECOVERED).double().mean().item(),
        "mcc": found.mcc,
        "uniqueness": found.uniqueness,
        "precision": found.classification.precision,
        "recall": found.classification.recall,
        "f1": found.classification.f1_score,
    }

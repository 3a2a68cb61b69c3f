"""Scores on synthetic data, of an SAE that has some of the true features."""

import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.synthetic import SyntheticModel, SyntheticModelConfig

from sae_lens_scale.analysis.scores import synthetic_scores

FEATURES = 16


@pytest.fixture(scope="module")
def model() -> SyntheticModel:
    cfg = SyntheticModelConfig(num_features=FEATURES, hidden_dim=64, bias=False, seed=0)
    return SyntheticModel(cfg)


def knowing(model: SyntheticModel, number: int) -> TopKSAE:
    """SAE whose first latents are true features, either sign; the others are noise."""
    sae = TopKSAE(TopKSAEConfig(d_in=64, d_sae=FEATURES, k=4))
    generator = torch.Generator().manual_seed(1)
    noise = torch.nn.functional.normalize(
        torch.randn(FEATURES, 64, generator=generator)
    )
    true = model.feature_dict.feature_vectors.detach()
    sae.W_dec.data = torch.cat([true[:number], noise[number:]])
    if number:
        sae.W_dec.data[0] *= -1
    sae.W_enc.data = sae.W_dec.data.T.clone()
    return sae


@pytest.mark.parametrize("number", [0, 8, 16])
def test_true_features_are_counted(number: int, model: SyntheticModel):
    scores = synthetic_scores(knowing(model, number), model, num_samples=512)
    assert scores["recovered"] == number / FEATURES
    assert (scores["mcc"] > 0.99) == (number == FEATURES)
    assert (scores["uniqueness"] == 1) == (number == FEATURES)
    assert scores["l0"] <= 4
    assert 0 < scores["alive"] <= 1


def test_an_sae_of_another_width_is_refused(model: SyntheticModel):
    sae = TopKSAE(TopKSAEConfig(d_in=32, d_sae=FEATURES, k=4))
    with pytest.raises(ValueError, match="d_in of the SAE must be 64, .* got 32"):
        synthetic_scores(sae, model)

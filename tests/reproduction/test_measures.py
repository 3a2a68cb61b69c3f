"""Measures of reconstruction; what training runs record is tested with these."""

import pytest
import torch
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler

from reproduction.activations import Activations
from reproduction.measures import firing_counts, reconstruction_error, variance


@pytest.fixture
def sae() -> TopKSAE:
    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=6, d_sae=20, k=3))
    sae.W_dec.data.normal_()
    sae.W_enc.data.copy_(sae.W_dec.T)
    sae.b_enc.data.normal_()
    return sae


def tokens(n: int) -> torch.Tensor:
    return 3 + torch.randn(n, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_batches_do_not_change_the_error(sae: TopKSAE, batch_size: int):
    x = tokens(50)
    error = (sae(x) - x).double().square().sum(-1).mean().item()
    variance = (x - x.mean(0)).double().square().sum(-1).mean().item()
    found = reconstruction_error(sae, Activations([x]), batch_size=batch_size)
    assert found["mse"] == pytest.approx(error, rel=1e-6)
    assert found["fvu"] == pytest.approx(error / variance, rel=1e-6)


def test_variance_is_the_error_of_the_mean():
    x = tokens(5_000)
    want = (x - x.mean(0)).double().square().sum(-1).mean().item()
    assert variance(Activations([x])) == pytest.approx(want, rel=1e-6)


def test_errors_are_in_the_activations_own_units(sae: TopKSAE):
    x = tokens(50)
    scaler = ActivationScaler(scaling_factor=0.1)
    want = (sae(0.1 * x) / 0.1 - x).square().sum(-1).mean().item()
    assert reconstruction_error(sae, Activations([x]), scaler)["mse"] == pytest.approx(
        want
    )


def test_there_must_be_something_to_explain(sae: TopKSAE):
    with pytest.raises(ValueError, match="must differ from token to token"):
        reconstruction_error(sae, Activations([torch.ones(3, 6)]))


def test_firing_is_counted_by_latent(sae: TopKSAE):
    x = tokens(1_500)
    want = (sae.encode(x) != 0).sum(0)
    assert torch.equal(firing_counts(sae, Activations([x])), want)
    assert 0 < want.count_nonzero() <= 20

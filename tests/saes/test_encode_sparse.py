"""``encode_sparse`` against ``encode``."""

from typing import Any

import pytest
import torch
from helpers import X, scale_sae, switch_sae

from sae_lens_scale.ops import SparseLatents


def dense(found: SparseLatents, d_sae: int) -> torch.Tensor:
    """The same activations ``[..., d_sae]``; a latent that is there twice counts twice."""
    acts = found.values.new_zeros(*found.values.shape[:-1], d_sae)
    for place in range(found.values.shape[-1]):
        index = found.indices[..., place : place + 1]
        acts.scatter_add_(-1, index, found.values[..., place : place + 1])
    return acts


@pytest.mark.parametrize("make", [scale_sae, switch_sae])
@pytest.mark.parametrize("x", [X, X.view(2, 4, 10), X[0], X[:0]])
def test_it_has_what_encode_has_without_making_it(
    make: Any, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    sae = make()
    expected = sae.encode(x)
    monkeypatch.setattr(SparseLatents, "to_dense", None)
    found = sae.encode_sparse(x)
    assert found.values.shape == found.indices.shape == (*x.shape[:-1], 6)
    torch.testing.assert_close(dense(found, 60), expected)
    weight = torch.arange(60.0, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((dense(found, 60) * weight).sum(), sae.W_enc)
    (same,) = torch.autograd.grad((expected * weight).sum(), sae.W_enc)
    torch.testing.assert_close(gradient, same)


def test_it_sees_what_hooks_and_subclasses_change():
    sae = scale_sae()

    def turn_on(tensor: torch.Tensor, *, hook: Any) -> torch.Tensor:
        acts = tensor.clone()
        acts[0, :9] = -2.0
        return acts

    sae.add_hook("hook_sae_acts_post", turn_on)
    expected = sae.encode(X)
    found = sae.encode_sparse(X)
    assert (expected[0, :9] == -2).all()
    assert found.values.shape[-1] == (expected != 0).sum(dim=-1).max() > 6
    torch.testing.assert_close(dense(found, 60), expected)

    sae.reset_hooks()
    sae.encode = lambda x: torch.zeros(len(x), 60)
    assert sae.encode_sparse(X).values.shape == (8, 0)


def test_an_expert_that_a_hook_selects_twice_counts_twice():
    sae = scale_sae()
    sae.add_hook("hook_expert_indices", lambda tensor, *, hook: tensor * 0 + 3)
    torch.testing.assert_close(dense(sae.encode_sparse(X), 60), sae.encode(X))


def test_another_width_is_refused():
    with pytest.raises(ValueError, match="d_in=10, got shape"):
        scale_sae().encode_sparse(X[:, :9])

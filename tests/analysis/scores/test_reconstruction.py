"""Reconstruction scores, against their definitions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import small_corpus
from sae_lens import HookedSAETransformer
from sae_lens.training.activations_store import ActivationsStore

from reproduction.activations import Activations
from reproduction.measures import firing_counts, reconstruction_error
from sae_lens_scale.analysis import feature_redundancy, loss_recovered
from sae_lens_scale.analysis.scores import reconstruction_scores

HOOK = "blocks.0.hook_resid_post"


def test_scores_are_those_of_the_package_and_its_laboratory(
    tiny_model: HookedSAETransformer, make_sae: Callable[..., Any]
):
    sae = make_sae("topk", normalize_activations="none")
    sae.cfg.metadata.exclude_special_tokens = False
    # Two that are the same, of those that fire.
    sae.W_dec.data[1] = sae.W_dec.data[0]

    def store() -> ActivationsStore:
        return ActivationsStore.from_sae(
            tiny_model, sae, small_corpus(), store_batch_size_prompts=2, total_tokens=0
        )

    found = reconstruction_scores(tiny_model, sae, store(), 2, 2)
    source = store()
    tokens = [source.get_batch_tokens() for _ in range(4)]
    loss = loss_recovered(tiny_model, sae, tokens[:2], exclude_special_tokens=False)
    assert found["loss_recovered"] == pytest.approx(loss.score, abs=1e-4)
    with torch.no_grad():
        of_hook = [tiny_model.run_with_cache(ids)[1][HOOK] for ids in tokens[2:]]
    activations = Activations([torch.cat(of_hook).flatten(0, 1)])
    error = reconstruction_error(sae, activations)
    assert found["fvu"] == pytest.approx(error["fvu"], rel=1e-4)
    fires = firing_counts(sae, activations) > 0
    assert found["alive"] == fires.double().mean().item()
    assert found["l0"] == pytest.approx(6)
    alive = feature_redundancy(sae.W_dec, alive=fires).alive
    assert alive is not None
    assert found["redundancy"] == alive.share_above


def test_a_collapsed_sae_has_no_redundancy(
    tiny_model: HookedSAETransformer, make_sae: Callable[..., Any]
):
    sae = make_sae("standard")
    sae.b_enc.data.fill_(-1e6)
    sae.b_dec.data.zero_()
    store = ActivationsStore.from_sae(
        tiny_model, sae, small_corpus(), store_batch_size_prompts=2, total_tokens=0
    )
    found = reconstruction_scores(tiny_model, sae, store, 1, 2)
    assert found["alive"] == found["l0"] == 0
    assert found["redundancy"] is None

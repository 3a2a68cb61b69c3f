"""Overlaps of the latents that tokens activate, against loops over pairs of tokens."""

import json
import math
from collections import Counter
from dataclasses import asdict
from fractions import Fraction
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from helpers import randomize, scale_sae, switch_sae
from sae_lens.registry import get_sae_class, get_sae_training_class

from sae_lens_scale.analysis import similarity as module
from sae_lens_scale.analysis.similarity import (
    OverlapHistogram,
    activation_similarity,
    overlap_histogram,
)
from sae_lens_scale.ops import SparseLatents

X = torch.randn(37, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def dense(classes: Any, **settings: Any) -> Any:
    sae_class, config_class = classes
    settings = {"d_in": 10, "d_sae": 60, "dtype": "float64", **settings}
    sae = sae_class(config_class(**settings))
    randomize(sae)
    return sae


topk = partial(dense, get_sae_class("topk"), k=6)
gated = partial(dense, get_sae_class("gated"))
standard = partial(dense, get_sae_class("standard"))
SAES: dict[str, Any] = {
    "scale": scale_sae,
    "scale, wide": partial(scale_sae, k=20),
    "switch": switch_sae,
    "topk": topk,
    "topk in training": partial(
        dense, get_sae_training_class("topk"), k=6, use_sparse_activations=True
    ),
    "batchtopk in training": partial(dense, get_sae_training_class("batchtopk"), k=6.5),
    "gated": gated,
    "standard": standard,
    "a single latent": partial(standard, d_sae=1),
}
all_saes = pytest.mark.parametrize("name", SAES)


def active_sets(sae: Any, x: torch.Tensor) -> list[set[int]]:
    acts = sae.encode(x)
    acts = acts.to_dense() if acts.is_sparse else acts
    return [
        {i for i, value in enumerate(row) if value != 0}
        for row in acts.reshape(-1, acts.shape[-1]).tolist()
    ]


def slow_overlaps(sets: list[set[int]]) -> list[int]:
    return [len(a & b) for a, b in combinations(sets, 2)]


def slow_histogram(sae: Any, sets: list[set[int]]) -> list[int]:
    counts = Counter(slow_overlaps(sets))
    largest = max(len(s) for s in sets)
    return [counts[n] for n in range(max(largest, int(getattr(sae.cfg, "k", 0))) + 1)]


@all_saes
def test_similarity_is_equation_A3_summed_over_pairs(name: str):
    sae = SAES[name]()
    sets = active_sets(sae, X)
    l0 = Fraction(sum(len(s) for s in sets), 37)
    k = Fraction(getattr(sae.cfg, "k", l0))
    # The sum over i != j has every pair twice.
    want = sum(2 * Fraction(n) / k for n in slow_overlaps(sets)) / (37 * 36)
    got = activation_similarity(sae, [X])
    assert got.similarity == pytest.approx(float(want), rel=1e-14)
    assert 0 < got.similarity < 1
    assert (got.tokens, got.k, got.l0) == (37, float(k), float(l0))
    assert json.loads(json.dumps(asdict(got))) == asdict(got)


@all_saes
def test_histogram_is_that_of_a_loop_over_pairs(name: str):
    sae = SAES[name]()
    found = overlap_histogram(sae, [X])
    assert found.pairs == slow_histogram(sae, active_sets(sae, X))
    assert (found.tokens, found.tokens_given) == (37, 37)
    assert sum(found.pairs) == 37 * 36 // 2
    assert sum(found.shares) == pytest.approx(1)
    similarity = activation_similarity(sae, [X])
    assert found.mean / similarity.k == pytest.approx(similarity.similarity)
    assert json.loads(json.dumps(asdict(found))) == asdict(found)


@pytest.mark.parametrize("name", ["scale", "switch", "topk", "gated"])
def test_batches_of_any_shape_are_as_their_tokens_in_a_row(name: str):
    sae = SAES[name]()
    batches = [X[:0], X[:12].view(2, 2, 3, 10), X[12], X[13:14], X[14:]]
    assert activation_similarity(sae, batches) == activation_similarity(sae, [X])
    assert overlap_histogram(sae, batches) == overlap_histogram(sae, [X])
    assert overlap_histogram(sae, iter(X)) == overlap_histogram(sae, [X])


@pytest.mark.parametrize("values", [1, 300, 37 * 30, 37 * 60])
def test_histogram_does_not_depend_on_the_blocks(
    values: int, monkeypatch: pytest.MonkeyPatch
):
    sae = scale_sae()
    monkeypatch.setattr(module, "_BLOCK_VALUES", values)
    assert overlap_histogram(sae, [X]).pairs == slow_histogram(sae, active_sets(sae, X))


def test_k_is_the_configured_one_the_mean_l0_or_the_one_given():
    sae = topk()
    # ReLU follows TopK: tokens activate fewer latents than k.
    sae.b_enc.data -= 4
    found = activation_similarity(sae, [X])
    assert found.k == 6 > found.l0
    without = activation_similarity(gated(), [X])
    assert without.k == without.l0
    given = activation_similarity(sae, [X], k=found.l0)
    assert given.k == found.l0
    assert given.similarity == pytest.approx(found.similarity * 6 / found.l0)
    for k in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="k must be a positive number, got"):
            activation_similarity(sae, [X], k=k)


@pytest.mark.parametrize("name", ["scale", "topk", "gated"])
def test_tokens_that_activate_nothing_share_nothing(name: str):
    sae = SAES[name]()
    for parameter in {"b_enc", "b_gate", "b_mag"} & {*dict(sae.named_parameters())}:
        sae.get_parameter(parameter).data -= 1e6
    pairs = [37 * 36 // 2] + [0] * getattr(sae.cfg, "k", 0)
    assert overlap_histogram(sae, [X]) == OverlapHistogram(pairs, 37, 37)
    if name == "gated":
        with pytest.raises(ValueError, match="at least one latent, got none"):
            activation_similarity(sae, [X])
    else:
        assert activation_similarity(sae, [X]).similarity == 0


def test_a_sample_holds_as_many_tokens_as_asked_whatever_the_batches():
    sae = scale_sae()
    whole = overlap_histogram(sae, [X], max_tokens=9, seed=5)
    assert (whole.tokens, whole.tokens_given) == (9, 37)
    assert sum(whole.pairs) == 36
    for batches in (X.split(4), X.split(1), [X[:30], X[30:]]):
        assert overlap_histogram(sae, batches, max_tokens=9, seed=5) == whole
    assert overlap_histogram(sae, [X], max_tokens=9, seed=6) != whole
    everything = overlap_histogram(sae, [X])
    assert overlap_histogram(sae, [X], max_tokens=37, seed=6) == everything


def test_every_token_is_as_likely_to_be_in_the_sample():
    # Token t activates latents 0 to t, so that two tokens tell their smaller index.
    sae = standard(d_in=6, d_sae=6)
    sae.W_enc.data = torch.eye(6).double()
    sae.b_enc.data = sae.b_dec.data = torch.zeros(6).double()
    tokens = torch.ones(6, 6).double().tril()
    smaller = Counter()
    for seed in range(600):
        pairs = overlap_histogram(sae, tokens.split(2), max_tokens=2, seed=seed).pairs
        smaller[pairs.index(1) - 1] += 1
    for t in range(5):
        # 5 - t of the 15 pairs; five standard deviations.
        expected = 600 * (5 - t) / 15
        assert abs(smaller[t] - expected) < 5 * expected**0.5
    assert smaller.total() == 600


def test_mixtures_are_measured_without_d_sae_values_for_each_token(
    monkeypatch: pytest.MonkeyPatch,
):
    sae = scale_sae()
    want = activation_similarity(sae, [X]), overlap_histogram(sae, [X])

    def refuse(*args: Any) -> None:
        raise AssertionError("activations were spread over d_sae latents")

    monkeypatch.setattr(SparseLatents, "to_dense", refuse)
    assert (activation_similarity(sae, [X]), overlap_histogram(sae, [X])) == want


def test_edits_of_the_activations_count():
    sae = scale_sae()

    def drop(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        return acts.index_fill(-1, torch.arange(30), 0)

    plain = activation_similarity(sae, [X])
    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", drop)]):
        sets = active_sets(sae, X)
        assert activation_similarity(sae, [X]).l0 < plain.l0
        assert overlap_histogram(sae, [X]).pairs == slow_histogram(sae, sets)


def test_an_expert_that_an_edit_selects_twice_is_counted_once():
    sae = scale_sae(k=12)

    def twice(indices: torch.Tensor, hook: Any) -> torch.Tensor:
        return indices[..., :1].expand_as(indices)

    with sae.hooks(fwd_hooks=[("hook_expert_indices", twice)]):
        sets = active_sets(sae, X)
        assert overlap_histogram(sae, [X]).pairs == slow_histogram(sae, sets)
        l0 = sum(len(s) for s in sets) / 37
        assert activation_similarity(sae, [X]).l0 == l0


@pytest.mark.parametrize("measure", [activation_similarity, overlap_histogram])
def test_gradients_are_off(measure: Any):
    enabled = []

    def watch(x: torch.Tensor, hook: Any) -> None:
        enabled.append(torch.is_grad_enabled())

    sae = scale_sae()
    with sae.hooks(fwd_hooks=[("hook_sae_input", watch)]):
        measure(sae, [X])
    assert enabled == [False]


@pytest.mark.parametrize("measure", [activation_similarity, overlap_histogram])
def test_pairs_of_fewer_than_two_tokens_are_refused(measure: Any):
    sae = scale_sae()
    for batches, tokens in (([], 0), ([X[:0]], 0), ([X[0]], 1), ([X[:1], X[:0]], 1)):
        with pytest.raises(ValueError, match=f"at least two tokens, got {tokens}"):
            measure(sae, batches)


@pytest.mark.parametrize("measure", [activation_similarity, overlap_histogram])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_activations_that_are_not_finite_are_refused(measure: Any, bad: float):
    x = X.clone()
    x[3, 2] = bad
    with pytest.raises(ValueError, match="activations must be finite.*in batch 2"):
        measure(scale_sae(), [X, X, x])


def test_a_sample_of_fewer_than_two_tokens_is_refused():
    with pytest.raises(ValueError, match="max_tokens must be at least 2, got 1"):
        overlap_histogram(scale_sae(), [X], max_tokens=1)


@pytest.mark.parametrize("measure", [activation_similarity, overlap_histogram])
@pytest.mark.parametrize("name", ["scale", "topk"])
def test_feature_activations_that_are_not_finite_are_refused(measure: Any, name: str):
    sae = SAES[name]()
    sae.b_enc.data[:] = math.nan
    with pytest.raises(ValueError, match="feature activations must be .* batch 0, at"):
        measure(sae, [X])


@pytest.mark.parametrize("name", ["scale", "topk"])
def test_heads_of_hook_z_may_be_joined_already(name: str):
    sae = SAES[name]()
    sae.cfg.metadata.hook_name = "blocks.0.attn.hook_z"
    want = activation_similarity(sae, [X]), overlap_histogram(sae, [X])
    sae.turn_on_forward_pass_hook_z_reshaping()
    for x in (X, X.view(37, 5, 2)):
        assert (activation_similarity(sae, [x]), overlap_histogram(sae, [x])) == want


def test_the_default_device_does_not_matter():
    sae = scale_sae()
    want = overlap_histogram(sae, [X], 20)
    with torch.device("meta"):
        assert overlap_histogram(sae, [X], 20) == want


def test_numbers_of_any_type_end_as_JSON_and_others_are_refused():
    sae: Any = scale_sae()
    text: Any = "6"
    want = asdict(activation_similarity(sae, [X], 6))
    numbers: list[Any] = [np.float32(6), torch.tensor(6)]
    for k in numbers:
        found = asdict(activation_similarity(sae, [X], k))
        assert json.loads(json.dumps(found)) == want
    with pytest.raises(ValueError, match="k must be a number, got '6'"):
        activation_similarity(sae, [X], text)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        overlap_histogram(sae, [X], seed=-1)

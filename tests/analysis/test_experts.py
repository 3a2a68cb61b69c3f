"""Measurements on experts, against loops over tokens and all pairs."""

import json
import math
from collections import Counter
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize, scale_sae, switch_sae
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from sae_lens_scale import ScaleSAE, ScaleSAEConfig
from sae_lens_scale.analysis import experts as module
from sae_lens_scale.analysis.experts import (
    ExpertUsage,
    SetSimilarity,
    expert_coactivation,
    expert_similarity,
    expert_usage,
    scaling_factors,
)

X = torch.randn(40, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def simple_sae() -> ScaleSAE:
    """Each token selects the experts of its two largest coordinates."""
    sae = ScaleSAE(
        ScaleSAEConfig(d_in=4, d_sae=16, num_experts=4, experts_per_token=2, k=2)
    )
    sae.W_router.data = torch.eye(4)
    sae.b_router.data.zero_()
    return sae


def slow_set_similarity(rows: torch.Tensor, threshold: float) -> SetSimilarity:
    rows = rows.detach().double()
    cosines = torch.cosine_similarity(rows[:, None], rows, dim=-1)
    pairs = torch.stack([cosines[p] for p in combinations(range(len(rows)), 2)])
    largest = cosines.fill_diagonal_(-torch.inf).amax(dim=1)
    return SetSimilarity(
        mean_cosine=pairs.mean().item(),
        mean_max_cosine=largest.mean().item(),
        share_above=(largest > threshold).double().mean().item(),
    )


def test_expert_usage_counts_the_selections_of_all_batches():
    # Experts 0 and 1 for the first three tokens, 0 and 2 for the fourth.
    tokens = torch.tensor([[3.0, 2, 1, 0]] * 3 + [[3.0, 1, 2, 0]])
    usage = expert_usage(simple_sae(), [tokens[:3], tokens[3]])
    assert usage.counts == [4, 3, 1, 0]
    assert usage.idle_experts == 1
    share = torch.tensor([4 / 8, 3 / 8, 1 / 8])
    want = -(share * share.log()).sum() / torch.tensor(4.0).log()
    assert usage.entropy == pytest.approx(want.item())
    assert json.loads(json.dumps(asdict(usage))) == asdict(usage)


def test_expert_usage_of_batches_of_any_shape_is_that_of_their_tokens():
    sae = scale_sae()
    usage = expert_usage(sae, [X])
    assert expert_usage(sae, [X[:24].view(2, 3, 4, 10), X[24], X[25:]]) == usage
    assert usage.counts == [
        int((sae.route(X).indices == expert).sum()) for expert in range(5)
    ]


def test_heads_of_hook_z_may_be_joined_already():
    sae = scale_sae()
    sae.cfg.metadata.hook_name = "blocks.0.attn.hook_z"
    want = expert_usage(sae, [X]), expert_coactivation(sae, [X])[1]
    sae.turn_on_forward_pass_hook_z_reshaping()
    for x in (X, X.view(40, 5, 2)):
        assert (expert_usage(sae, [x]), expert_coactivation(sae, [x])[1]) == want
    assert sae.hook_z_reshaping_mode


def test_the_entropy_of_expert_usage_leaves_shared_experts_out():
    sae = scale_sae(experts_per_token=3, num_shared_experts=2)
    usage = expert_usage(sae, [X])
    assert usage.counts[:2] == [len(X)] * 2
    share = torch.tensor(usage.counts[2:]) / len(X)
    want = torch.special.entr(share).sum() / torch.tensor(3.0).log()
    assert usage.entropy == pytest.approx(want.item())


def test_cumulative_shares_sort_by_use_and_end_at_1():
    usage = ExpertUsage([1, 0, 5, 2, 2], 1, 0.5)
    assert usage.cumulative_shares == [5 / 10, 7 / 10, 9 / 10, 1, 1]


def test_a_single_expert_is_fully_used():
    usage = expert_usage(switch_sae(num_experts=1), [X])
    assert usage == ExpertUsage([40], 0, 1.0)


@pytest.mark.parametrize(
    "sae",
    [
        scale_sae(),
        scale_sae(experts_per_token=3),
        scale_sae(experts_per_token=5),
        switch_sae(),
        switch_sae(num_experts=1),
    ],
)
def test_expert_coactivation_counts_what_a_loop_over_tokens_counts(sae: Any):
    num_experts = sae.cfg.num_experts
    chosen = [sorted(indices.tolist()) for indices in sae.route(X).indices]
    together = Counter(pair for experts in chosen for pair in combinations(experts, 2))
    alone = Counter(expert for experts in chosen for expert in experts)
    want = torch.tensor([alone[i] for i in range(num_experts)]).diag()
    for (i, j), count in together.items():
        want[i, j] = want[j, i] = count
    counts, summary = expert_coactivation(sae, [X[:7].view(7, 1, 10), X[7], X[8:]])
    assert torch.equal(counts, want)
    assert summary.tokens == 40
    assert summary.pairs == len(list(combinations(range(num_experts), 2)))
    assert summary.pairs_used == len(together)
    ranked = sorted(together, key=lambda pair: (-together[pair], pair))
    assert [(p.first, p.second) for p in summary.strongest] == ranked
    for pair in summary.strongest:
        assert pair.tokens == together[pair.first, pair.second]
        expected = alone[pair.first] / 40 * alone[pair.second] / 40 * 40
        assert pair.lift == pytest.approx(pair.tokens / expected)
    assert json.loads(json.dumps(asdict(summary))) == asdict(summary)


def test_expert_coactivation_lists_as_many_pairs_as_asked():
    for limit in (0, 1, 3):
        _, summary = expert_coactivation(scale_sae(), [X], num_strongest=limit)
        assert len(summary.strongest) == limit
        assert summary.pairs_used > 3
    with pytest.raises(ValueError, match="num_strongest must be at least 0, got -1"):
        expert_coactivation(scale_sae(), [X], num_strongest=-1)


@pytest.mark.parametrize("block", [5, 8192])
@pytest.mark.parametrize("make", [scale_sae, switch_sae])
def test_similarity_within_experts_is_that_of_all_pairs(
    make: Any, block: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_BLOCK", block)
    sae = make(dtype="float32")
    sae.W_dec.data[14] = sae.W_dec.data[17] * 2  # Duplicates within expert 1,
    sae.W_dec.data[3] = sae.W_dec.data[50]  # of two experts,
    sae.W_dec.data[30] = 0  # and a latent without direction.
    found = expert_similarity(sae, threshold=0.8)
    assert found.threshold == 0.8
    assert len(found.per_expert) == len(found.per_sample) == 5
    for expert, got in enumerate(found.per_expert):
        rows = sae.W_dec[expert * 12 : (expert + 1) * 12]
        want = asdict(slow_set_similarity(rows, 0.8))
        assert asdict(got) == pytest.approx(want, abs=1e-6)
    assert found.per_expert[1].share_above > 0
    means = (found.intra, found.per_expert), (found.inter, found.per_sample)
    for mean, sets in means:
        for name, value in asdict(mean).items():
            values = [getattr(s, name) for s in sets]
            assert value == pytest.approx(sum(values) / len(values))
    assert json.loads(json.dumps(asdict(found))) == asdict(found)


def test_experts_of_clustered_latents_are_more_alike_than_random_sets():
    sae = scale_sae(dtype="float32")
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(5, 1, 10, generator=generator)
    noise = torch.randn(5, 12, 10, generator=generator)
    sae.W_dec.data = (centers + 0.1 * noise).flatten(0, 1)
    found = expert_similarity(sae)
    assert found.intra.mean_cosine > 0.9 > 0.5 > found.inter.mean_cosine
    # About one pair in five of a random set is of one expert.
    assert found.inter.mean_cosine > 0.1


def test_random_sets_repeat_with_the_seed_and_hold_different_latents():
    sae = scale_sae()
    first = expert_similarity(sae, seed=3, num_samples=7)
    assert len(first.per_sample) == 7
    assert expert_similarity(sae, seed=3, num_samples=7) == first
    other = expert_similarity(sae, seed=4, num_samples=7)
    assert other.inter != first.inter
    assert other.intra == first.intra
    # A latent drawn twice would be its own duplicate.
    assert all(s.share_above == 0 for s in first.per_sample)


def test_similarity_of_weights_of_low_precision_is_accumulated_in_float32():
    sae = scale_sae(dtype="bfloat16")
    want = scale_sae(dtype="float32")
    want.W_dec.data = sae.W_dec.data.float()
    assert expert_similarity(sae) == expert_similarity(want)


@pytest.mark.parametrize(
    ("measure", "activations"),
    [(expert_usage, [[X]]), (expert_coactivation, [[X]]), (expert_similarity, [])],
)
def test_measures_of_experts_refuse_a_dense_sae(measure: Any, activations: list[Any]):
    sae = TopKSAE(TopKSAEConfig(d_in=10, d_sae=60, k=6))
    with pytest.raises(ValueError, match="sae must be a mixture of .* got .*'topk'"):
        measure(sae, *activations)


@pytest.mark.parametrize("measure", [expert_usage, expert_coactivation])
def test_measures_of_routing_refuse_no_tokens_and_bad_ones(measure: Any):
    sae = scale_sae()
    for empty in ([], [X[:0]], [torch.empty(3, 0, 10)]):
        with pytest.raises(ValueError, match="at least one token, got none"):
            measure(sae, empty)
    bad = X.clone()
    bad[3, 2] = math.nan
    with pytest.raises(ValueError, match="activations must be finite.*in batch 1"):
        measure(sae, [X, bad])
    with pytest.raises(ValueError, match=r"activations must be .*d_in=10\], got"):
        measure(sae, [X[:, :9]])
    sae.W_router.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="the router's probabilities must be finite"):
        measure(sae, [X])


def test_similarity_refuses_experts_of_one_latent_and_no_samples():
    sae = switch_sae(num_experts=60, k=1)
    with pytest.raises(ValueError, match="d_sae=60 and num_experts=60"):
        expert_similarity(sae)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        expert_similarity(scale_sae(), num_samples=0)
    with pytest.raises(ValueError, match="threshold must be between -1 and 1, got 2"):
        expert_similarity(scale_sae(), threshold=2)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        expert_similarity(scale_sae(), seed=-1)


def test_scaling_factors_are_the_omegas_in_training_in_files_and_after_folding(
    tmp_path: Path,
):
    sae = scale_sae(dtype="float32")
    assert sae.omega is not None
    want = sae.omega.tolist()
    assert scaling_factors(sae) == want
    sae.save_model(tmp_path / "checkpoint")
    sae.save_inference_model(tmp_path / "export")
    for name in ("checkpoint", "export"):
        for kind in (SAE, TrainingSAE):
            assert scaling_factors(kind.load_from_disk(tmp_path / name)) == want
    sae.omega.data += 1
    moved = sae.omega.tolist()
    assert scaling_factors(sae) == moved != want
    sae.fold_W_dec_norm()
    assert not sae.omega.any()
    assert scaling_factors(sae) == moved


@pytest.mark.parametrize("omega", [[0.0] * 3, [0.0] * 3 + [float("inf")], "abcd", 1])
def test_scaling_factors_that_are_not_one_for_each_expert_are_refused(omega: Any):
    sae = simple_sae()
    sae.cfg.metadata.omega = omega
    with pytest.raises(
        ValueError, match=r"metadata\.omega must be 4 finite numbers, got"
    ):
        scaling_factors(sae)


def test_scaling_factors_of_an_untrained_sae_are_zero():
    sae = scale_sae()
    sae.get_parameter("omega").data.zero_()
    assert scaling_factors(sae) == [0] * 5


@pytest.mark.parametrize(
    ("sae", "architecture"),
    [
        (switch_sae(), "switch"),
        (scale_sae(feature_scaling=False), "scale"),
        (simple_sae(), "scale"),
        (TopKSAE(TopKSAEConfig(d_in=10, d_sae=60, k=6)), "topk"),
    ],
    ids=["switch", "no feature scaling", "no training", "dense"],
)
def test_saes_without_scaling_factors_say_so(sae: Any, architecture: str):
    randomize(sae)
    with pytest.raises(ValueError, match=f"feature_scaling=True, got .*{architecture}"):
        scaling_factors(sae)

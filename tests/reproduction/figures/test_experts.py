"""Figures of what experts learned."""

from statistics import mean

import numpy as np
import pytest
from plot_records import Row, assert_same_points, draw, expected, points, where


def test_figure_2_draws_the_mean_omega_of_the_mean_decomposition():
    rows = [
        {**r, "omega": mean(r["scaling_factors"])}
        for r in where(feature_scaling=True, decomposition="mean")
    ]
    want = expected(rows, "k", "experts_per_token", "omega", "k = {:g}")
    assert_same_points(points(draw("2").axes[0]), want)


def test_expert_similarity_draws_both_kinds_at_one_k():
    rows = where(k=8, num_experts=64, feature_scaling=False)
    want = {}
    for line, column in (
        ("within an expert", "intra_expert_similarity"),
        ("sampled from all experts", "inter_expert_similarity"),
    ):
        named = [{**r, "line": line} for r in rows]
        want |= expected(named, "line", "experts_per_token", column)
    assert_same_points(points(draw("6a", k=8).axes[0]), want)


def usage(seed: int, counts: list[int]) -> Row:
    return {
        "label": "Scale 4/2",
        "k": 8,
        "seed": seed,
        "num_experts": 4,
        "experts_per_token": 2,
        "feature_scaling": True,
        "decomposition": "mean",
        "expert_counts": counts,
    }


def test_expert_usage_accumulates_the_most_used_first():
    rows = [usage(0, [1, 5, 0, 4]), usage(1, [10, 10, 10, 10])]
    figure = draw("6b", rows, k=8, num_experts=4)
    (axes,) = figure.axes
    uniform, line = axes.get_lines()
    assert np.asarray(uniform.get_data()).tolist() == [[0, 4], [0, 1]]
    assert np.asarray(line.get_xdata()).tolist() == [0, 1, 2, 3, 4]
    want = [0, (0.5 + 0.25) / 2, (0.9 + 0.5) / 2, (1 + 0.75) / 2, 1]
    assert np.asarray(line.get_ydata()) == pytest.approx(want)
    assert len(axes.collections) == 1
    assert not draw("6b", rows[:1], k=8, num_experts=4).axes[0].collections


@pytest.mark.parametrize("counts", [[1, 2, 3], [0, 0, 0, 0]])
def test_counts_that_are_not_each_experts_are_refused(counts: list[int]):
    with pytest.raises(ValueError, match=r"expert_counts must be num_experts=4 .*got"):
        draw("6b", [usage(0, counts)], k=8, num_experts=4)

"""Figures of reconstruction, and learning curves."""

import numpy as np
import pytest
from plot_records import (
    CURVES,
    QUANTILES,
    RUNS,
    SCORES,
    assert_same_points,
    draw,
    expected,
    points,
    where,
)


@pytest.mark.parametrize(
    ("figure", "metric"),
    [("3a", "fvu"), ("3b", "mse_other_domain"), ("3c", "loss_recovered")],
)
def test_figures_against_k_draw_the_metric_of_each_label(figure: str, metric: str):
    rows = where(label="Scale 64/2") + where(label="TopK 576")
    got = points(draw(figure, metric=metric).axes[0])
    assert_same_points(got, expected(rows, "label", "k", metric))


def test_autointerp_keeps_the_order_of_the_quantiles():
    measured, paper = draw("3d", paper=True).axes
    rows = [r for r in SCORES if r["label"] in ("Scale 64/2", "TopK 576")]
    want = expected(rows, "label", "quantile", "autointerp_accuracy")
    assert_same_points(points(measured), want)
    for line in (*points(measured).values(), *points(paper).values()):
        assert [*line] == QUANTILES


@pytest.mark.parametrize(
    ("figure", "metric"),
    [("4a", "mse"), ("4c", "loss_recovered"), ("7b", "activation_similarity")],
)
def test_figures_by_experts_draw_unscaled_SAEs_of_that_many_experts(
    figure: str, metric: str
):
    rows = where(num_experts=64, feature_scaling=False)
    want = expected(rows, "experts_per_token", "k", metric, "e = {:g}")
    assert [*want] == ["e = 1", "e = 2", "e = 16"]
    assert_same_points(points(draw(figure).axes[0]), want)
    with pytest.raises(ValueError, match="num_experts=7, feature_scaling=False"):
        draw(figure, num_experts=7)


def test_figure_5a_draws_scaled_SAEs_of_the_mean_decomposition():
    rows = where(feature_scaling=True, decomposition="mean")
    want = expected(rows, "k", "experts_per_token", "mse", "k = {:g}")
    assert_same_points(points(draw("5a").axes[0]), want)


def test_figure_5b_draws_both_sides_of_feature_scaling():
    names = {True: "with feature scaling", False: "without feature scaling"}
    rows = [
        {**r, "side": names[r["feature_scaling"]]} for r in where(experts_per_token=16)
    ]
    want = expected(rows, "side", "k", "mse")
    assert_same_points(points(draw("5b").axes[0]), want)
    # A decomposition says nothing where there is no scaling.
    rows = [
        {**r, "decomposition": r["decomposition"] if r.get("feature_scaling") else None}
        for r in RUNS
    ]
    assert_same_points(points(draw("5b", rows).axes[0]), want)


def test_decompositions_are_lines_of_one_size():
    rows = where(num_experts=64, experts_per_token=2, feature_scaling=True)
    want = expected(rows, "decomposition", "k", "mse")
    assert set(want) == {"mean", "identity", "learned"}
    assert_same_points(points(draw("10").axes[0]), want)


def test_learning_curves_average_the_points_that_all_seeds_reached():
    late = {"label": "TopK 576", "seed": 1, "tokens": 3000}
    rows = [r for r in CURVES if {n: r[n] for n in late} != late]
    other_k = [{**r, "k": 8} for r in CURVES]
    figure = draw("curves", [*rows, *other_k], k=32)
    for axes, speed, delay in zip(figure.axes, (100, 1), (0.5, 0), strict=True):
        scale, topk = axes.get_lines()
        assert scale.get_label() == "Scale 64/2"
        # Seed 1 starts a second after seed 0; what has seen no tokens is left out.
        want = [tokens / speed + delay for tokens in (1000, 2000, 3000)]
        assert np.asarray(scale.get_xdata()) == pytest.approx(want)
        assert np.asarray(scale.get_ydata()) == pytest.approx([0.45, 0.35, 0.25])
        assert np.asarray(topk.get_ydata()) == pytest.approx([0.45, 0.35])
        band = axes.collections[0].get_paths()[0].vertices
        spread = 0.1 / np.sqrt(2)
        assert np.ptp(np.asarray(band)[:, 1]) == pytest.approx(0.2 + 2 * spread)
    assert figure.get_supxlabel().startswith("mean over 2 seeds; bands")


def test_a_learning_curve_of_one_seed_has_no_band():
    figure = draw("curves", [r for r in CURVES if r["seed"] == 0])
    assert figure.get_supxlabel() == "1 seed"
    assert not figure.axes[0].collections


def test_learning_curves_of_seeds_without_a_common_point_are_refused():
    rows = [{**r, "tokens": r["tokens"] + r["seed"]} for r in CURVES]
    with pytest.raises(ValueError, match="'Scale 64/2' share no number of tokens"):
        draw("curves", rows)

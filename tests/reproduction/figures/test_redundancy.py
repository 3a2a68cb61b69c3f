"""Figures of how much latents repeat each other."""

from statistics import mean, stdev

import numpy as np
import pytest
from plot_records import (
    KS,
    RUNS,
    assert_same_points,
    draw,
    expected,
    legend,
    points,
    where,
)


def test_similarity_reduction_compares_runs_that_differ_in_scaling_only():
    rows = where(num_experts=64, decomposition="mean")
    kept = [r for r in rows if r["feature_scaling"] or r["seed"] < 2]
    got = points(draw("7a", kept).axes[0])
    key = ("experts_per_token", "k", "seed", "feature_scaling")
    similarity = {tuple(r[n] for n in key): r["activation_similarity"] for r in rows}
    for e in (1, 2, 16):
        for k in KS:
            percents = [
                100 - 100 * similarity[e, k, s, True] / similarity[e, k, s, False]
                for s in (0, 1)
            ]
            assert got[f"e = {e}"][k] == pytest.approx(
                (mean(percents), stdev(percents))
            )
    with pytest.raises(ValueError, match="with and without feature scaling"):
        draw("7a", where(feature_scaling=True))
    with pytest.raises(ValueError, match="without feature scaling must be positive"):
        draw("7a", [{**r, "activation_similarity": 0.0} for r in rows])


def test_redundancy_is_drawn_for_each_label_with_a_place_for_zero():
    rows = [{**r, "redundancy": r["redundancy"] * (r["k"] > 8)} for r in RUNS]
    (axes,) = draw("redundancy", rows).axes
    of_labels = [r for r in rows if r["label"] in ("Scale 64/2", "TopK 576")]
    assert_same_points(points(axes), expected(of_labels, "label", "k", "redundancy"))
    low, high = axes.get_ylim()
    assert low < 0 and high > max(y for y, _ in points(axes)["TopK 576"].values())
    formatter = axes.yaxis.get_major_formatter()
    assert [formatter(y) for y in (0, 0.001, 0.1)] == ["0%", "0.1%", "10%"]


def test_redundancy_cells_hold_percentages_in_colours_of_one_scale():
    figure = draw("8a", paper=True)
    measured, paper = figure.axes
    rows = where(num_experts=64, feature_scaling=False)
    want = expected(rows, "experts_per_token", "k", "redundancy")
    texts = {t.get_position(): t.get_text() for t in measured.texts}
    cells = np.asarray(measured.images[0].get_array())
    for row, e in enumerate((1, 2, 16)):
        for column, k in enumerate(KS):
            average, spread = want[str(e)][k]
            assert cells[row, column] == pytest.approx(average)
            text = f"{100 * average:.3g}\n± {100 * spread:.2g}"
            assert texts.pop((column, row)) == text
    assert not texts
    # At e = 1 and k = 4.
    assert [t.get_text() for t in paper.texts if t.get_position() == (1, 0)] == ["24"]
    top = max(average for line in want.values() for average, _ in line.values())
    for axes in figure.axes:
        assert axes.images[0].get_clim() == pytest.approx((0, top))


def test_cells_without_redundancy_are_dark_and_those_without_runs_empty():
    rows = [{**r, "redundancy": 0.0} for r in where(seed=0, feature_scaling=False)]
    rows = [r for r in rows if (r["experts_per_token"], r["k"]) != (2, 8)]
    (axes,) = draw("8a", rows).axes
    assert [t.get_text() for t in axes.texts] == ["0"] * 5
    assert axes.images[0].get_clim() == (0, 1)
    assert np.isnan(np.ma.filled(axes.images[0].get_array(), np.nan)).sum() == 1


def test_figure_8b_draws_both_sides_of_feature_scaling_at_one_k():
    names = {True: "with feature scaling", False: "without feature scaling"}
    rows = [
        {**r, "side": names[r["feature_scaling"]]}
        for r in where(num_experts=64, decomposition="mean", k=8)
    ]
    want = expected(rows, "side", "experts_per_token", "redundancy")
    assert_same_points(points(draw("8b", k=8).axes[0]), want)


def test_overlap_histograms_are_shares_in_a_panel_for_each_e_and_k():
    figure = draw("11")
    assert [axes.get_title() for axes in figure.axes] == [
        f"e = {e}, k = {k}" for e in (1, 2, 16) for k in KS
    ]
    for line, scaling in zip(figure.axes[1].get_lines(), (False, True), strict=True):
        rows = where(num_experts=64, experts_per_token=1, k=32, feature_scaling=scaling)
        histograms = [np.array(r["overlap_histogram"]) for r in rows]
        want = np.mean([h / h.sum() for h in histograms], axis=0)
        assert np.asarray(line.get_ydata()) == pytest.approx(want)
    assert legend(figure) == ["without feature scaling", "with feature scaling"]


def test_numbers_of_latents_that_no_pair_shares_have_no_point():
    rows = [{**r, "overlap_histogram": [1] + [0] * r["k"]} for r in RUNS]
    line = draw("11", rows).axes[0].get_lines()[0]
    assert np.isnan(np.asarray(line.get_ydata())).tolist() == [False] + [True] * 8


@pytest.mark.parametrize("histogram", [[1, 2], [0] * 9])
def test_histograms_that_are_not_of_k_are_refused(histogram: list[int]):
    with pytest.raises(ValueError, match=r"k \+ 1 = 9 entries"):
        draw("11", [{**r, "overlap_histogram": histogram} for r in RUNS])

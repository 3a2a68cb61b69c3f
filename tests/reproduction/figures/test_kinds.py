"""Kinds of figures that are no lines of means: cells, usage, histograms, learning curves."""

import numpy as np
import pytest
from plot_records import CURVES, KS, RUNS, Row, draw, expected, legend, where


def test_redundancy_cells_hold_percentages_in_colours_of_one_scale():
    figure = draw("figure-8a", paper=True)
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
    (axes,) = draw("figure-8a", rows).axes
    assert [t.get_text() for t in axes.texts] == ["0"] * 5
    assert axes.images[0].get_clim() == (0, 1)
    cells = axes.images[0].get_array()
    assert cells is not None
    assert np.isnan(np.ma.filled(cells, np.nan)).sum() == 1


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
    figure = draw("figure-6b", rows, k=8, num_experts=4)
    (axes,) = figure.axes
    uniform, line = axes.get_lines()
    assert np.asarray(uniform.get_data()).tolist() == [[0, 4], [0, 1]]
    assert np.asarray(line.get_xdata()).tolist() == [0, 1, 2, 3, 4]
    want = [0, (0.5 + 0.25) / 2, (0.9 + 0.5) / 2, (1 + 0.75) / 2, 1]
    assert np.asarray(line.get_ydata()) == pytest.approx(want)
    assert len(axes.collections) == 1
    alone = draw("figure-6b", rows[:1], k=8, num_experts=4)
    assert not alone.axes[0].collections


@pytest.mark.parametrize("counts", [[1, 2, 3], [0, 0, 0, 0]])
def test_counts_that_are_not_each_experts_are_refused(counts: list[int]):
    with pytest.raises(ValueError, match=r"expert_counts must be num_experts=4 .*got"):
        draw("figure-6b", [usage(0, counts)], k=8, num_experts=4)


def test_overlap_histograms_are_shares_in_a_panel_for_each_e_and_k():
    figure = draw("figure-11")
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
    line = draw("figure-11", rows).axes[0].get_lines()[0]
    assert np.isnan(np.asarray(line.get_ydata())).tolist() == [False] + [True] * 8


@pytest.mark.parametrize("histogram", [[1, 2], [0] * 9])
def test_histograms_that_are_not_of_k_are_refused(histogram: list[int]):
    with pytest.raises(
        ValueError, match=r"overlap_histogram must be k \+ 1 = 9 counts .*got"
    ):
        draw("figure-11", [{**r, "overlap_histogram": histogram} for r in RUNS])


def test_learning_curves_average_the_points_that_all_seeds_reached():
    late = {"label": "TopK 576", "seed": 1, "tokens": 3000}
    rows = [r for r in CURVES if {n: r[n] for n in late} != late]
    other_k = [{**r, "k": 8} for r in CURVES]
    figure = draw("learning-curves", [*rows, *other_k])
    for axes, speed, delay in zip(figure.axes, (100, 1), (0.5, 0), strict=True):
        scale, topk = axes.get_lines()
        assert scale.get_label() == "Scale 64/2"
        # Seed 1 starts a second after seed 0; the point without tokens is left out.
        want = [tokens / speed + delay for tokens in (1000, 2000, 3000)]
        assert np.asarray(scale.get_xdata()) == pytest.approx(want)
        assert np.asarray(scale.get_ydata()) == pytest.approx([0.45, 0.35, 0.25])
        assert np.asarray(topk.get_ydata()) == pytest.approx([0.45, 0.35])
        band = axes.collections[0].get_paths()[0].vertices
        spread = 0.1 / np.sqrt(2)
        assert np.ptp(np.asarray(band)[:, 1]) == pytest.approx(0.2 + 2 * spread)
    assert figure.get_supxlabel().startswith("mean over 2 seeds; bands")
    assert figure.get_suptitle() == "k = 32; seconds are CPU time"


def test_learning_curves_say_the_k_that_is_drawn():
    figure = draw("learning-curves", [{**r, "k": 8} for r in CURVES], k=8)
    assert figure.get_suptitle() == "k = 8; seconds are CPU time"


def test_a_learning_curve_of_one_seed_has_no_band():
    figure = draw("learning-curves", [r for r in CURVES if r["seed"] == 0])
    assert figure.get_supxlabel() == "1 seed"
    assert not figure.axes[0].collections


def test_learning_curves_of_seeds_without_a_common_point_are_refused():
    rows = [{**r, "tokens": r["tokens"] + r["seed"]} for r in CURVES]
    with pytest.raises(ValueError, match="'Scale 64/2' share no number of tokens"):
        draw("learning-curves", rows)

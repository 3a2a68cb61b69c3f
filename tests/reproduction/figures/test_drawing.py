"""Looks that all figures have in common: lines and captions, colours, axes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from plot_records import (
    CURVES,
    LABELS,
    RUNS,
    assert_same_points,
    draw,
    expected,
    legend,
    named_lines,
    points,
    where,
)

from reproduction.figures import Plot
from reproduction.figures import draw as draw_figure
from reproduction.figures.table import QUALITY_AND_COST


def test_lines_are_means_over_seeds_and_bars_their_standard_deviations():
    order = [*LABELS][::-1]
    figure = draw("figure-3a", labels=order)
    (axes,) = figure.axes
    rows = [r for r in RUNS if r["label"] in LABELS]
    assert_same_points(points(axes), expected(rows, "label", "k", "mse"))
    assert legend(figure) == order
    assert figure.get_supxlabel() == ("mean over 3 seeds; bars are standard deviations")
    assert axes.get_ylabel() == "squared error, sum over d_in"
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_one_seed_has_no_bars_and_several_numbers_of_seeds_are_said():
    one = draw("figure-3a", [r for r in RUNS if r["seed"] == 0])
    assert one.get_supxlabel() == "1 seed"
    assert not one.axes[0].collections
    rows = [r for r in RUNS if r["seed"] == 0 or r["label"] == "TopK 576"]
    caption = draw("figure-3a", rows).get_supxlabel()
    assert caption.startswith("mean over 1 to 3 seeds")


def test_a_label_has_the_same_colour_everywhere_and_no_other_has_it():
    order = ["TopK 576", "Switch 32", "Scale 64/2", "Scale 128/4"]
    figures = [
        draw("figure-3a", labels=order, paper=True),
        draw("figure-3c", labels=order[::-1]),
        draw("learning-curves"),
    ]
    colors: dict[str, set[str]] = {}
    for figure in figures:
        for axes in figure.axes:
            for label, line in named_lines(axes).items():
                colors.setdefault(label, set()).add(to_hex(line.get_color()))
    assert all(len(of_label) == 1 for of_label in colors.values())
    # The small TopK SAEs of both panels are one architecture to the reader.
    assert colors.pop("TopK 768") == colors["TopK 576"]
    assert len(set.union(*colors.values())) == len(colors) == 6


def test_more_lines_than_can_be_told_apart_are_refused():
    assert len({r["label"] for r in RUNS}) == 11
    lines = named_lines(draw("figure-3a", labels=None).axes[0]).values()
    assert len({to_hex(line.get_color()) for line in lines}) == 11
    others = [{**RUNS[0], "label": f"another {i}"} for i in range(8)]
    draw("figure-3a", [*RUNS, *others[:7]], labels=None)
    rows = [*RUNS, *others]
    with pytest.raises(ValueError, match="18 lines apart, got 19"):
        draw("figure-3a", rows, labels=None)


def test_numbers_in_a_legend_are_in_order_whichever_panel_has_them():
    assert legend(draw("figure-5a", paper=True)) == ["k = 2", "k = 8", "k = 32"]


def test_numbers_without_a_place_on_the_axis_are_refused():
    zero = [{**r, "mse": 0.0} if r["seed"] == 1 else r for r in RUNS]
    with pytest.raises(ValueError, match=r"mse must be positive, got 0\.0"):
        draw("figure-3a", zero)
    infinite = [{**r, "loss_recovered": -np.inf} for r in RUNS]
    with pytest.raises(ValueError, match="loss_recovered must be finite, got -inf"):
        draw("loss-recovered", infinite)
    with pytest.raises(ValueError, match="fvu must be positive, got -1"):
        draw("learning-curves", [{**r, "fvu": -1.0} for r in CURVES])


@pytest.mark.parametrize(
    "name", ["figure-3a", "figure-8a", "figure-11", "learning-curves"]
)
def test_figures_are_saved_whatever_their_title(name: str, tmp_path: Path):
    drawn = draw(name, title="SmolLM2-135M")
    drawn.savefig(tmp_path / "figure.png", dpi=60)
    assert (tmp_path / "figure.png").stat().st_size > 5_000
    assert drawn.get_suptitle() == "SmolLM2-135M"


@pytest.mark.parametrize(
    "figure", ["figure-3a", "figure-11", replace(QUALITY_AND_COST, prepare=None)]
)
def test_a_dollar_sign_in_a_title_or_a_label_begins_no_formula(
    figure: str | Plot, tmp_path: Path
):
    (row,) = where(k=32, label="Scale 64/2", seed=0)
    runs = pd.DataFrame([{**row, "label": "$\\frac$", "training_flops": 1e9}])
    drawn = draw_figure(figure, runs, title="so $$")
    drawn.savefig(tmp_path / "figure.png", dpi=60)
    assert drawn.get_suptitle() == "so $$"


def test_a_narrow_axis_of_errors_has_numbers_too():
    rows = [{**r, "mse": 0.21 + 0.02 * r["seed"]} for r in RUNS]
    (axes,) = draw("figure-3a", rows).axes
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 2


def test_an_axis_of_shares_has_a_place_for_zero():
    rows = [{**r, "redundancy": r["redundancy"] * (r["k"] > 8)} for r in RUNS]
    (axes,) = draw("figure-8", rows).axes
    of_labels = [r for r in rows if r["label"] in ("Scale 64/2", "TopK 576")]
    assert_same_points(points(axes), expected(of_labels, "label", "k", "redundancy"))
    low, high = axes.get_ylim()
    assert low < 0 and high > max(y for y, _ in points(axes)["TopK 576"].values())
    formatter = axes.yaxis.get_major_formatter()
    assert [formatter(y) for y in (0, 0.001, 0.1)] == ["0%", "0.1%", "10%"]

"""What all figures have in common."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from plot_records import (
    CURVES,
    FIGURES,
    LABELS,
    RUNS,
    WITH_LABELS,
    assert_same_points,
    draw,
    expected,
    legend,
    named_lines,
    points,
)

from reproduction.paper import paper_figure

# But for 8a, which draws no lines.
WITH_PAPER = ("2", *WITH_LABELS[:5], "4a", "4c", "5a", "5b", "7a", "7b", "10")


def test_lines_are_means_over_seeds_and_bars_their_standard_deviations():
    order = [*LABELS][::-1]
    figure = draw("3a", labels=order)
    (axes,) = figure.axes
    rows = [r for r in RUNS if r["label"] in LABELS]
    assert_same_points(points(axes), expected(rows, "label", "k", "mse"))
    assert legend(figure) == order
    assert figure.get_supxlabel() == ("mean over 3 seeds; bars are standard deviations")
    assert axes.get_ylabel() == "squared error, sum over d_in"
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_one_seed_has_no_bars_and_several_numbers_of_seeds_are_said():
    one = draw("3a", [r for r in RUNS if r["seed"] == 0])
    assert one.get_supxlabel() == "1 seed"
    assert not one.axes[0].collections
    rows = [r for r in RUNS if r["seed"] == 0 or r["label"] == "TopK 576"]
    caption = draw("3a", rows).get_supxlabel()
    assert caption.startswith("mean over 1 to 3 seeds")


@pytest.mark.parametrize("figure", WITH_PAPER)
def test_the_papers_numbers_have_a_dashed_panel_of_their_own(figure: str):
    measured, paper = draw(figure, paper=True).axes
    (alone,) = draw(figure).axes
    assert points(measured) == points(alone)
    numbers = paper_figure(figure)
    values = sorted(y for line in points(paper).values() for y, _ in line.values())
    assert values == sorted(numbers.results[numbers.metric])
    assert measured.get_title() == "measured"
    assert paper.get_title().startswith("paper (GPT-2 small")
    assert (numbers.dataset or "") in paper.get_title()
    for axes, style in ((measured, "-"), (paper, "--")):
        assert {line.get_linestyle() for line in named_lines(axes).values()} == {style}
    assert measured.get_xlim() == paper.get_xlim()
    (low, high), (paper_low, paper_high) = measured.get_ylim(), paper.get_ylim()
    if numbers.metric == "mse":
        # Another model's: the same factor, not the same numbers.
        assert high / low == pytest.approx(paper_high / paper_low)
        assert high < paper_low
    else:
        assert (low, high) == (paper_low, paper_high)


def test_a_label_has_the_same_colour_everywhere_and_no_other_has_it():
    order = ["TopK 576", "Switch 32", "Scale 64/2", "Scale 128/4"]
    figures = [
        draw("3a", labels=order, paper=True),
        draw("3c", labels=order[::-1]),
        draw("curves"),
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
    lines = named_lines(draw("3a", labels=None).axes[0]).values()
    assert len({to_hex(line.get_color()) for line in lines}) == 11
    others = [{**RUNS[0], "label": f"another {i}"} for i in range(8)]
    draw("3a", [*RUNS, *others[:7]], labels=None)
    rows = [*RUNS, *others]
    with pytest.raises(ValueError, match="18 lines apart, got 19"):
        draw("3a", rows, labels=None)


def test_numbers_in_a_legend_are_in_order_whichever_panel_has_them():
    assert legend(draw("5a", paper=True)) == ["k = 2", "k = 8", "k = 32"]


@pytest.mark.parametrize("figure", FIGURES)
def test_nothing_to_draw_and_missing_columns_are_refused_by_name(figure: str):
    plot, rows, columns = FIGURES[figure]
    frame = pd.DataFrame(rows)
    for column in columns:
        with pytest.raises(ValueError, match=f"must have the columns .*'{column}'"):
            plot(frame.drop(columns=column))
    for empty in (frame.iloc[:0], frame.assign(**{columns[0]: None})):
        with pytest.raises(ValueError, match=f"must have rows with .*{columns[0]}"):
            plot(empty)


@pytest.mark.parametrize("figure", FIGURES)
def test_runs_that_differ_in_something_else_do_not_pass_for_seeds(figure: str):
    plot, rows, _ = FIGURES[figure]
    with pytest.raises(ValueError, match="one row for each .* and seed, got several"):
        plot(pd.DataFrame([*rows, *rows]))


@pytest.mark.parametrize("figure", WITH_LABELS)
def test_labels_that_are_not_there_are_refused_by_name(figure: str):
    with pytest.raises(ValueError, match=r"must be among .*got \['Scale 1/1'\]"):
        draw(figure, labels=["Scale 64/2", "Scale 1/1"])
    _, rows, (metric, *_) = FIGURES[figure]
    lost = [{**r, metric: None} if r["label"] == "TopK 576" else r for r in rows]
    with pytest.raises(ValueError, match=f"label 'TopK 576' lack .*{metric}"):
        draw(figure, lost)


def test_numbers_without_a_place_on_the_axis_are_refused():
    zero = [{**r, "mse": 0.0} if r["seed"] == 1 else r for r in RUNS]
    with pytest.raises(ValueError, match=r"mse must be positive, got 0\.0"):
        draw("3a", zero)
    infinite = [{**r, "loss_recovered": -np.inf} for r in RUNS]
    with pytest.raises(ValueError, match="loss_recovered must be finite, got -inf"):
        draw("3c", infinite)
    with pytest.raises(ValueError, match="fvu must be positive, got -1"):
        draw("curves", [{**r, "fvu": -1.0} for r in CURVES])


@pytest.mark.parametrize("figure", ["3a", "8a", "11", "curves"])
def test_figures_are_saved_whatever_their_title(figure: str, tmp_path: Path):
    drawn = draw(figure, title="SmolLM2-135M")
    drawn.savefig(tmp_path / "figure.png", dpi=60)
    assert (tmp_path / "figure.png").stat().st_size > 5_000
    assert drawn.get_suptitle() == "SmolLM2-135M"


def test_a_narrow_axis_of_errors_has_numbers_too():
    rows = [{**r, "mse": 0.21 + 0.02 * r["seed"]} for r in RUNS]
    (axes,) = draw("3a", rows).axes
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 2

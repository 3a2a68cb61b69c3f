"""The table of the figures: the entries' lines, and what every entry refuses."""

from collections.abc import Callable
from dataclasses import replace
from statistics import mean, stdev

import pandas as pd
import pytest
from plot_records import (
    FEW_LABELS,
    KS,
    NEEDED,
    QUANTILES,
    RUNS,
    SCORES,
    WITH_LABELS,
    Row,
    assert_same_points,
    draw,
    expected,
    named_lines,
    points,
    usual_rows,
    where,
)

from reproduction import figures
from reproduction.figures import FIGURES, Metric
from reproduction.figures.kinds import lines
from reproduction.paper import paper_figure

# The paper's figures whose numbers are drawn beside; those of 8a are no lines.
NUMBERED = ["2", "3a", "3b", "3c", "3d", "4a", "4c", "5a", "5b", "7a", "7b", "10"]
WITH_PAPER = {f"figure-{number}": number for number in NUMBERED}
WITH_PAPER["figure-8"] = "redundancy"
SIDES = {True: "with feature scaling", False: "without feature scaling"}


def of_labels(rows: list[Row]) -> list[Row]:
    return [r for r in rows if r["label"] in FEW_LABELS]


def unscaled() -> list[Row]:
    return where(num_experts=64, feature_scaling=False)


def both_sides(rows: list[Row]) -> list[Row]:
    return [{**r, "side": SIDES[r["feature_scaling"]]} for r in rows]


def omegas() -> list[Row]:
    rows = where(feature_scaling=True, decomposition="mean")
    return [{**r, "omega": mean(r["scaling_factors"])} for r in rows]


def both_similarities() -> list[Row]:
    names = {
        "within an expert": "intra_expert_similarity",
        "sampled from all experts": "inter_expert_similarity",
    }
    rows = where(k=32, num_experts=64, feature_scaling=False)
    return [
        {**r, "line": name, "cosine": r[column]}
        for name, column in names.items()
        for r in rows
    ]


def reductions() -> list[Row]:
    rows = where(num_experts=64, decomposition="mean")
    key = ("experts_per_token", "k", "seed")
    plain = {tuple(r[n] for n in key): r for r in rows if not r["feature_scaling"]}
    similarity = "activation_similarity"
    return [
        {
            **r,
            "percent": 100
            - 100 * r[similarity] / plain[tuple(r[n] for n in key)][similarity],
        }
        for r in rows
        if r["feature_scaling"]
    ]


BY_LABEL = (lambda: of_labels(RUNS), "label", "k")
BY_EXPERTS = (unscaled, "experts_per_token", "k")
# The rows that each figure's lines are of, and columns: line, x, metric; and names of lines.
LINES: dict[str, tuple[Callable[[], list[Row]], str, str, str, str]] = {
    "figure-2": (omegas, "k", "experts_per_token", "omega", "k = {:g}"),
    "figure-3a": (*BY_LABEL, "mse", "{}"),
    "figure-3b": (*BY_LABEL, "mse_other_domain", "{}"),
    "figure-3c": (*BY_LABEL, "loss_recovered_other_domain", "{}"),
    "figure-3d": (
        lambda: of_labels(SCORES),
        "label",
        "quantile",
        "autointerp_accuracy",
        "{}",
    ),
    "figure-4a": (*BY_EXPERTS, "mse", "e = {:g}"),
    "figure-4b": (*BY_EXPERTS, "mse_other_domain", "e = {:g}"),
    "figure-4c": (*BY_EXPERTS, "loss_recovered", "e = {:g}"),
    "figure-4d": (*BY_EXPERTS, "loss_recovered_other_domain", "e = {:g}"),
    "figure-5a": (omegas, "k", "experts_per_token", "mse", "k = {:g}"),
    "figure-5b": (
        lambda: both_sides(where(experts_per_token=16)),
        "side",
        "k",
        "mse",
        "{}",
    ),
    "figure-6a": (both_similarities, "line", "experts_per_token", "cosine", "{}"),
    "figure-7a": (reductions, "experts_per_token", "k", "percent", "e = {:g}"),
    "figure-7b": (*BY_EXPERTS, "activation_similarity", "e = {:g}"),
    "figure-8": (*BY_LABEL, "redundancy", "{}"),
    "figure-8b": (
        lambda: both_sides(where(num_experts=64, decomposition="mean", k=8)),
        "side",
        "experts_per_token",
        "redundancy",
        "{}",
    ),
    "figure-10": (
        lambda: where(num_experts=64, experts_per_token=2, feature_scaling=True),
        "decomposition",
        "k",
        "mse",
        "{}",
    ),
    "loss-recovered": (*BY_LABEL, "loss_recovered", "{}"),
}


def test_every_entry_of_the_table_is_checked_below():
    assert set(LINES) == {n for n, plot in FIGURES.items() if plot.kind is lines}
    assert set(NEEDED) == set(FIGURES)
    numbered = {name: plot.paper for name, plot in FIGURES.items() if plot.paper}
    assert numbered == {**WITH_PAPER, "figure-8a": "8a"}


@pytest.mark.parametrize("name", LINES)
def test_lines_are_means_over_seeds_of_the_metric(name: str):
    rows, *columns = LINES[name]
    want = expected(rows(), *columns)
    names = {"experts_per_token": ["e = 1", "e = 2", "e = 16"], "label": FEW_LABELS}
    if FIGURES[name].line in names:
        assert sorted(want) == sorted(names[FIGURES[name].line])
    assert len(want) > 1
    assert_same_points(points(draw(name).axes[0]), want)


def test_a_metric_of_ones_own_is_drawn_in_place_of_the_entrys():
    fvu = Metric("fvu", "fraction of variance unexplained", "log")
    plot = replace(FIGURES["figure-3a"], metric=fvu)
    figure = figures.draw(plot, pd.DataFrame(RUNS), labels=FEW_LABELS, paper=True)
    measured, paper = figure.axes
    want = expected(of_labels(RUNS), "label", "k", "fvu")
    assert_same_points(points(measured), want)
    assert measured.get_ylabel() == "fraction of variance unexplained"
    assert paper.get_ylabel() == "squared error, sum over d_in"


def test_settings_of_the_entry_can_be_replaced():
    names = {"k": 8, "num_experts": 64, "feature_scaling": False}
    got = points(draw("figure-6a", k=8).axes[0])["within an expert"]
    want = expected(
        where(**names), "num_experts", "experts_per_token", "intra_expert_similarity"
    )
    assert_same_points({"64": got}, want)
    for name in ("figure-4a", "figure-4c", "figure-7b"):
        with pytest.raises(ValueError, match="num_experts=7, feature_scaling=False"):
            draw(name, num_experts=7)


def test_both_sides_of_feature_scaling_need_a_decomposition_on_one_only():
    rows = [
        {**r, "decomposition": r["decomposition"] if r.get("feature_scaling") else None}
        for r in RUNS
    ]
    assert points(draw("figure-5b", rows).axes[0]) == points(draw("figure-5b").axes[0])


def test_autointerp_keeps_the_order_of_the_quantiles():
    measured, paper = draw("figure-3d", paper=True).axes
    for line in (*points(measured).values(), *points(paper).values()):
        assert [*line] == QUANTILES


def test_similarity_reduction_compares_runs_that_differ_in_scaling_only():
    rows = where(num_experts=64, decomposition="mean")
    kept = [r for r in rows if r["feature_scaling"] or r["seed"] < 2]
    got = points(draw("figure-7a", kept).axes[0])
    for e in (1, 2, 16):
        for k in KS:
            percents = [
                r["percent"]
                for r in reductions()
                if (r["experts_per_token"], r["k"]) == (e, k) and r["seed"] < 2
            ]
            want = (mean(percents), stdev(percents))
            assert got[f"e = {e}"][k] == pytest.approx(want)
    with pytest.raises(ValueError, match="with and without feature scaling"):
        draw("figure-7a", where(feature_scaling=True))
    zero = [{**r, "activation_similarity": 0.0} for r in rows]
    with pytest.raises(ValueError, match="without feature scaling must be positive"):
        draw("figure-7a", zero)


@pytest.mark.parametrize("name", WITH_PAPER)
def test_the_papers_numbers_have_a_dashed_panel_of_their_own(name: str):
    measured, paper = draw(name, paper=True).axes
    (alone,) = draw(name).axes
    assert points(measured) == points(alone)
    numbers = paper_figure(WITH_PAPER[name])
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


def test_figures_without_numbers_in_the_papers_scripts_have_one_panel():
    assert len(draw("figure-4b", paper=True).axes) == 1


def test_unknown_figures_are_refused_by_name():
    with pytest.raises(ValueError, match="figures are figure-2, .*got 'figure-99'"):
        figures.draw("figure-99", pd.DataFrame(RUNS))


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_to_draw_and_missing_columns_are_refused_by_name(name: str):
    frame = pd.DataFrame(usual_rows(name))
    for column in NEEDED[name]:
        with pytest.raises(ValueError, match=f"must have the columns .*'{column}'"):
            figures.draw(name, frame.drop(columns=column))
    first = NEEDED[name][0]
    for empty in (frame.iloc[:0], frame.assign(**{first: None})):
        with pytest.raises(ValueError, match=f"must have rows with .*{first}"):
            figures.draw(name, empty)


@pytest.mark.parametrize("name", FIGURES)
def test_runs_that_differ_in_something_else_do_not_pass_for_seeds(name: str):
    rows = usual_rows(name)
    with pytest.raises(ValueError, match="one row for each .* and seed, got several"):
        figures.draw(name, pd.DataFrame([*rows, *rows]))


@pytest.mark.parametrize("name", WITH_LABELS)
def test_labels_that_are_not_there_are_refused_by_name(name: str):
    with pytest.raises(ValueError, match=r"must be among .*got \['Scale 1/1'\]"):
        draw(name, labels=["Scale 64/2", "Scale 1/1"])
    metric = FIGURES[name].metric.column
    lost = [
        {**r, metric: None} if r["label"] == "TopK 576" else r for r in usual_rows(name)
    ]
    with pytest.raises(ValueError, match=f"label 'TopK 576' lack .*{metric}"):
        draw(name, lost)

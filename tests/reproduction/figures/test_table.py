"""The table of the figures: the entries' lines, and what every entry refuses."""

from dataclasses import replace
from operator import itemgetter
from statistics import mean, stdev
from typing import Any

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
OF_LABELS = [r for r in RUNS if r["label"] in FEW_LABELS]
UNSCALED = where(num_experts=64, feature_scaling=False)
OMEGAS = [
    {**r, "omega": mean(r["scaling_factors"])}
    for r in where(feature_scaling=True, decomposition="mean")
]
SIMILARITIES = [
    {**r, "line": name, "cosine": r[f"{column}_similarity"]}
    for name, column in (
        ("within an expert", "intra_expert"),
        ("sampled from all experts", "inter_expert"),
    )
    for r in UNSCALED
    if r["k"] == 32
]


def both_sides(**conditions: Any) -> list[Row]:
    return [{**r, "side": SIDES[r["feature_scaling"]]} for r in where(**conditions)]


def reductions() -> list[Row]:
    key = itemgetter("experts_per_token", "k", "seed")
    plain = {key(r): r["activation_similarity"] for r in UNSCALED}
    return [
        {**r, "percent": 100 - 100 * r["activation_similarity"] / plain[key(r)]}
        for r in where(num_experts=64, decomposition="mean", feature_scaling=True)
    ]


BY_LABEL = (OF_LABELS, "label", "k")
BY_EXPERTS = (UNSCALED, "experts_per_token", "k")
SIDES_OF_SMALLEST_K = both_sides(num_experts=64, decomposition="mean", k=8)
OF_DECOMPOSITIONS = where(num_experts=64, experts_per_token=2, feature_scaling=True)
# The rows that each figure's lines are of, and columns: line, x, metric.
LINES: dict[str, tuple[list[Row], str, str, str]] = {
    "figure-2": (OMEGAS, "k", "experts_per_token", "omega"),
    "figure-3a": (*BY_LABEL, "mse"),
    "figure-3b": (*BY_LABEL, "mse_other_domain"),
    "figure-3c": (*BY_LABEL, "loss_recovered_other_domain"),
    "figure-3d": (
        [r for r in SCORES if r["label"] in FEW_LABELS],
        *("label", "quantile", "autointerp_accuracy"),
    ),
    "figure-4a": (*BY_EXPERTS, "mse"),
    "figure-4b": (*BY_EXPERTS, "mse_other_domain"),
    "figure-4c": (*BY_EXPERTS, "loss_recovered"),
    "figure-4d": (*BY_EXPERTS, "loss_recovered_other_domain"),
    "figure-5a": (OMEGAS, "k", "experts_per_token", "mse"),
    "figure-5b": (both_sides(experts_per_token=16), "side", "k", "mse"),
    "figure-6a": (SIMILARITIES, "line", "experts_per_token", "cosine"),
    "figure-7a": (reductions(), "experts_per_token", "k", "percent"),
    "figure-7b": (*BY_EXPERTS, "activation_similarity"),
    "figure-8": (*BY_LABEL, "redundancy"),
    "figure-8b": (SIDES_OF_SMALLEST_K, "side", "experts_per_token", "redundancy"),
    "figure-10": (OF_DECOMPOSITIONS, "decomposition", "k", "mse"),
    "loss-recovered": (*BY_LABEL, "loss_recovered"),
}
NAMES = {"k": "k = {:g}", "experts_per_token": "e = {:g}"}


def test_every_entry_of_the_table_is_checked_below():
    assert set(LINES) == {n for n, plot in FIGURES.items() if plot.kind is lines}
    assert set(NEEDED) == set(FIGURES)
    numbered = {name: plot.paper for name, plot in FIGURES.items() if plot.paper}
    assert numbered == {**WITH_PAPER, "figure-8a": "8a"}


@pytest.mark.parametrize("name", FIGURES)
def test_axes_and_the_papers_numbers_are_of_the_domain_that_is_drawn(name: str):
    metric, paper = FIGURES[name].metric, FIGURES[name].paper
    other = metric.column.endswith("other_domain")
    assert metric.label.endswith("other domain") == other
    dataset = paper_figure(paper).dataset if paper else None
    if dataset and metric.column.startswith(("mse", "loss")):
        assert dataset.lower() == ("hle-biomedical" if other else "openwebtext")


@pytest.mark.parametrize("name", LINES)
def test_lines_are_means_over_seeds_of_the_metric(name: str):
    rows, line, x, metric = LINES[name]
    want = expected(rows, line, x, metric, NAMES.get(line, "{}"))
    names = {"experts_per_token": ["e = 1", "e = 2", "e = 16"], "label": FEW_LABELS}
    if line in names:
        assert sorted(want) == sorted(names[line])
    assert len(want) > 1
    assert_same_points(points(draw(name).axes[0]), want)


def test_a_metric_of_ones_own_is_drawn_in_place_of_the_entrys():
    fvu = Metric("fvu", "fraction of variance unexplained", "log")
    plot = replace(FIGURES["figure-3a"], metric=fvu)
    figure = figures.draw(plot, pd.DataFrame(RUNS), labels=FEW_LABELS, paper=True)
    measured, paper = figure.axes
    want = expected(OF_LABELS, "label", "k", "fvu")
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

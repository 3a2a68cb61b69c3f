"""The paper's numbers, checked against its text."""

from statistics import mean

import pytest

from reproduction.paper import paper_figure

FIGURES = ["2", "3a", "3b", "3c", "3d", "4a", "4c", "5a", "5b", "7a", "7b", "8a", "10"]


def by_line(figure: str, line: str) -> dict[object, list[float]]:
    """Each line's numbers, by k."""
    numbers = paper_figure(figure)
    found: dict[object, list[float]] = {}
    for row in numbers.results.sort_values("k").to_dict("records"):
        found.setdefault(row[line], []).append(row[numbers.metric])
    return found


@pytest.mark.parametrize("figure", [*FIGURES, "redundancy"])
def test_every_figure_has_one_number_for_each_point(figure: str):
    numbers = paper_figure(figure)
    rows = numbers.results.to_dict("records")
    values = [row.pop(numbers.metric) for row in rows]
    assert all(isinstance(value, float) and value == value for value in values)
    assert len({str(row) for row in rows}) == len(rows)
    if numbers.metric in ("loss_recovered", "redundancy", "activation_similarity"):
        assert min(values) >= 0 and max(values) < 1


def test_figure_3a_has_the_reductions_of_section_3_1():
    mse = by_line("3a", "label")
    reductions = [
        100 * (1 - min(scale) / min(others))
        for *scale, switch, topk in zip(
            mse["Scale 64/2"],
            mse["Scale 128/4"],
            mse["Scale 256/8"],
            mse["Switch 32"],
            mse["TopK 768"],
            strict=True,
        )
        for others in [(switch, topk)]
    ]
    assert [round(percent, 2) for percent in reductions[-3:]] == [37.21, 41.99, 42.54]


def test_figure_5b_has_the_reduction_of_section_3_2():
    mse = by_line("5b", "feature_scaling")
    pairs = zip(mse[True], mse[False], strict=True)
    reduction = mean(100 * (1 - scaled / plain) for scaled, plain in pairs)
    assert reduction == pytest.approx(10.9, abs=0.2)


def test_figures_of_the_same_runs_agree():
    without_scaling = by_line("4a", "experts_per_token")[16]
    assert without_scaling == by_line("5b", "feature_scaling")[False]
    assert (
        by_line("10", "decomposition")["mean"] == by_line("3a", "label")["Scale 256/8"]
    )


def test_columns_are_those_of_measured_runs():
    results = paper_figure("4a").results
    columns = ["experts_per_token", "num_experts", "feature_scaling", "k", "mse"]
    assert [*results.columns] == columns
    assert len(results) == 5 * 7
    assert set(results["num_experts"]) == {64}
    assert set(results["feature_scaling"]) == {False}
    rows = paper_figure("3a").results.to_dict("records")
    gated = [row for row in rows if row["label"] == "Gated 768"]
    assert max(row["k"] for row in gated) == pytest.approx(217.445)


def test_callers_cannot_change_each_others_numbers():
    results = paper_figure("3a").results
    results["mse"] = 0.0
    assert min(paper_figure("3a").results["mse"]) > 800


def test_unknown_figure_is_refused_by_name():
    with pytest.raises(ValueError, match="'redundancy'.*got '9'"):
        paper_figure("9")

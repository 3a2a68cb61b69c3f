"""Made-up records to draw, and the points of a drawn panel."""

from itertools import product
from statistics import mean, stdev
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from reproduction import figures
from reproduction.figures import FIGURES

Row = dict[str, Any]
# Of a line: x, and there the mean over seeds and its standard deviation.
Points = dict[Any, tuple[float, float]]

LABELS = {
    "Scale 64/2": (64, 2),
    "Scale 128/4": (128, 4),
    "Switch 32": (32, 1),
    "TopK 576": (None, None),
}
KS = (8, 32)
QUANTILES = ["not", *map(str, range(1, 11))]
_METRICS = (
    "mse",
    "mse_other_domain",
    "fvu",
    "loss_recovered",
    "loss_recovered_other_domain",
    "redundancy",
    "activation_similarity",
    "intra_expert_similarity",
    "inter_expert_similarity",
)


def _make_runs() -> list[Row]:
    """A main comparison, and the ablations of Scale SAE with 64 experts."""
    rng = np.random.default_rng(0)
    settings: list[Row] = [
        {"label": label, "num_experts": num_experts, "experts_per_token": e}
        for label, (num_experts, e) in LABELS.items()
        if label != "Scale 64/2"
    ]
    variants = [(e, scaling, "mean") for e in (1, 2, 16) for scaling in (True, False)]
    for e, scaling, decomposition in [
        *variants,
        (2, True, "identity"),
        (2, True, "learned"),
    ]:
        name = "" if decomposition == "mean" else f" {decomposition}"
        settings.append(
            {
                "label": f"Scale 64/{e}{name if scaling else ' unscaled'}",
                "num_experts": 64,
                "experts_per_token": e,
                "feature_scaling": scaling,
                "decomposition": decomposition,
            }
        )
    runs: list[Row] = []
    for k, of_run, seed in product(KS, settings, range(3)):
        run = {**of_run, "k": k, "seed": seed}
        run |= {name: float(rng.uniform(0.1, 0.9)) for name in _METRICS}
        run["overlap_histogram"] = rng.integers(1, 1000, k + 1).tolist()
        if run["num_experts"]:
            run["expert_counts"] = rng.integers(0, 99, run["num_experts"]).tolist()
        if run.get("feature_scaling"):
            run["scaling_factors"] = rng.uniform(0, 1, run["num_experts"]).tolist()
        runs.append(run)
    return runs


def _make_scores() -> list[Row]:
    rng = np.random.default_rng(1)
    names = ("label", "seed", "quantile")
    return [
        dict(zip(names, run, strict=True))
        | {"autointerp_accuracy": rng.uniform(0.3, 0.9)}
        for run in product(LABELS, (0, 1), QUANTILES)
    ]


def _make_curves() -> list[Row]:
    return [
        {
            "label": label,
            "k": 32,
            "seed": seed,
            "tokens": tokens,
            "cpu_seconds": tokens / speed + seed,
            "fvu": 0.5 + 0.1 * seed - tokens / 10_000,
        }
        for label, speed in (("Scale 64/2", 100), ("TopK 576", 200))
        for seed in (0, 1)
        for tokens in (0, 1000, 2000, 3000)
    ]


RUNS, SCORES, CURVES = _make_runs(), _make_scores(), _make_curves()
ROWS = {"scores": SCORES, "curves": CURVES}
# Columns that each figure needs.
NEEDED = {
    "figure-2": ["scaling_factors", "decomposition"],
    "figure-3a": ["mse", "label", "k", "seed"],
    "figure-3b": ["mse_other_domain"],
    "figure-3c": ["loss_recovered_other_domain"],
    "figure-3d": ["autointerp_accuracy", "quantile"],
    "figure-4a": ["mse", "num_experts", "feature_scaling"],
    "figure-4b": ["mse_other_domain"],
    "figure-4c": ["loss_recovered"],
    "figure-4d": ["loss_recovered_other_domain"],
    "figure-5a": ["mse", "experts_per_token"],
    "figure-5b": ["mse", "decomposition"],
    "figure-6a": ["intra_expert_similarity"],
    "figure-6b": ["expert_counts"],
    "figure-7a": ["activation_similarity"],
    "figure-7b": ["activation_similarity"],
    "figure-8": ["redundancy"],
    "figure-8a": ["redundancy"],
    "figure-8b": ["redundancy"],
    "figure-10": ["mse", "decomposition"],
    "figure-11": ["overlap_histogram"],
    "loss-recovered": ["loss_recovered"],
    "learning-curves": ["fvu", "cpu_seconds", "tokens"],
}
FEW_LABELS = ["Scale 64/2", "TopK 576"]
WITH_LABELS = [name for name, plot in FIGURES.items() if plot.line == "label"]


def usual_rows(name: str) -> list[Row]:
    """The rows that a figure is drawn of."""
    return ROWS.get(FIGURES[name].source, RUNS)


def draw(name: str, rows: list[Row] | None = None, **settings: Any) -> Figure:
    """A figure, of its usual rows and a few labels unless others are given."""
    if name in WITH_LABELS:
        settings = {"labels": FEW_LABELS, **settings}
    frame = pd.DataFrame(usual_rows(name) if rows is None else rows)
    return figures.draw(name, frame, **settings)


def where(**conditions: Any) -> list[Row]:
    """The runs that meet conditions."""
    return [r for r in RUNS if all(r.get(n) == v for n, v in conditions.items())]


def named_lines(axes: Axes) -> dict[str, Line2D]:
    """A panel's lines by their names, with error bars or without."""
    found = {str(line.get_label()): line for line in axes.get_lines()}
    for bars in axes.containers:
        assert isinstance(bars, ErrorbarContainer)
        found[str(bars.get_label())] = bars.lines[0]
    return {name: line for name, line in found.items() if name[:1] != "_"}


def points(axes: Axes) -> dict[str, Points]:
    """The points of each line with error bars; 0 is no bar."""
    found: dict[str, Points] = {}
    for bars in axes.containers:
        assert isinstance(bars, ErrorbarContainer)
        x, y = (np.asarray(values) for values in bars.lines[0].get_data(orig=True))
        half = np.zeros(len(x))
        if bars.has_yerr:
            (segments,) = bars.lines[2]
            half = [np.ptp(ends[:, 1]) / 2 for ends in segments.get_segments()]
        of_line = zip(y.tolist(), map(float, half), strict=True)
        found[str(bars.get_label())] = dict(zip(x.tolist(), of_line, strict=True))
    return found


def expected(
    rows: list[Row], line: str, x: str, metric: str, name: str = "{}"
) -> dict[str, Points]:
    """The same from the rows, point by point."""
    found: dict[str, Points] = {}
    for row in rows:
        values = [r[metric] for r in rows if (r[line], r[x]) == (row[line], row[x])]
        of_line = found.setdefault(name.format(row[line]), {})
        of_line[row[x]] = (mean(values), stdev(values))
    return found


def assert_same_points(got: dict[str, Points], want: dict[str, Points]) -> None:
    assert set(got) == set(want)
    for name, of_line in want.items():
        assert set(got[name]) == set(of_line)
        for x, point in of_line.items():
            assert got[name][x] == pytest.approx(point), (name, x)


def legend(figure: Figure) -> list[str]:
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]

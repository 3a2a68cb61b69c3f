"""
Kinds of figures: an entry of the table, and the functions that draw one.

Each of ``lines``, ``costs``, ``cells``, ``usage``, ``overlaps`` and ``curves`` takes the entry, the panels
(measured numbers, and beside them the paper's if they are asked for) and a title.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from .drawing import (
    add_legend,
    draw_curve,
    draw_curves,
    draw_lines,
    equalize_ratios,
    finish_axes,
    line_styles,
    name_of,
    panel_figure,
    seeds_caption,
    set_caption,
    set_title,
    tidy,
)
from .points import Point, over_seeds, require_positive


@dataclass(frozen=True)
class Metric:
    """
    A measured number, a column of the runs, and the name and scale of its axis.

    The scale "share" is written in percent, linear up to 0.1 % and logarithmic above; "percent" has
    a line at zero.
    """

    column: str
    label: str
    scale: Literal["linear", "log", "share", "percent"] = "linear"


@dataclass(frozen=True)
class Panel:
    """A frame of runs to draw side by side with others, and the metric to draw of it."""

    runs: pd.DataFrame
    metric: Metric
    title: str = ""
    linestyle: str = "-"


@dataclass(frozen=True)
class Plot:
    """
    A figure of one metric: an entry of the table.

    Attributes:
        kind: Function that draws it.
        line: Column that tells the lines apart.
        x: Column of the horizontal axis.
        where: Columns, and the value that runs must have, as in :func:`.points.select`.
        paper: The paper's figure to draw beside, see :func:`~reproduction.paper.paper_figure`;
            None if the authors' scripts hold no numbers of it.
        source: Runs of which the report draws it: the "main" grid without dense SAEs of full
            width, the whole "grid", its "curves", or an ablation's ("experts", "decompositions"). It draws none of "scores".
        needs: Columns that it is drawn of, if these are not the line, x and the metric.
        prepare: Function that computes the metric from these.
        title: Title, with the names of ``where`` in braces.
    """

    kind: Callable[["Plot", Sequence[Panel], str | None], Figure]
    metric: Metric
    line: str = "label"
    x: str = "k"
    where: Mapping[str, Any] = field(default_factory=dict)
    paper: str | None = None
    source: str = "main"
    needs: Sequence[str] = ()
    prepare: Callable[[pd.DataFrame], pd.DataFrame] | None = None
    title: str | None = None


def lines(plot: Plot, panels: Sequence[Panel], title: str | None) -> Figure:
    """
    Lines, error bars being the standard deviation over seeds.

    Shares have the same axis in all panels. Logarithmic axes, those of errors, span the same
    factor in each: activations of another model have other norms, but equal ratios look equal.
    """
    metric = plot.metric
    points = [over_seeds(p.runs, plot.line, plot.x, p.metric.column) for p in panels]
    log = metric.scale == "log"
    if log:
        require_positive(panels[0].runs[metric.column].tolist(), metric.column)
    figure, all_axes = panel_figure(len(panels), title, share_x=True, share_y=not log)
    for axes, panel, of_panel in zip(all_axes, panels, points, strict=True):
        draw_lines(axes, of_panel, plot.line, panel.linestyle)
        axes.set_title(panel.title, fontsize=10)
        if log or panel is panels[0]:
            axes.set_ylabel(panel.metric.label)
    for axes in all_axes:
        finish_axes(axes, plot.x, metric.scale)
    if log:
        equalize_ratios(all_axes)
    add_legend(figure, plot.line)
    set_caption(figure, seeds_caption(points[0], "bars are standard deviations"))
    return figure


def costs(plot: Plot, panels: Sequence[Panel], title: str | None) -> Figure:
    """A point for each line, with its name beside it, on logarithmic axes; one panel."""
    runs, metric = panels[0].runs, panels[0].metric
    points = over_seeds(runs, plot.line, plot.x, metric.column)
    figure, (axes,) = panel_figure(1, title)
    draw_lines(axes, points, plot.line)
    for point in points:
        axes.annotate(
            str(point.line),
            (point.x, point.mean),
            xytext=(8, 5),
            textcoords="offset points",
            fontsize=9,
            parse_math=False,
        )
    axes.set_xscale("log")
    axes.set_ylabel(metric.label)
    finish_axes(axes, plot.x, metric.scale)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    # Room for the names.
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.3, 3 * high)
    set_caption(figure, seeds_caption(points, "bars are standard deviations"))
    return figure


def cells(plot: Plot, panels: Sequence[Panel], title: str | None) -> Figure:
    """
    A table in colours, the same in all panels: a row for each line, mean and standard deviation
    in percent.
    """
    points = [over_seeds(p.runs, plot.line, plot.x, p.metric.column) for p in panels]
    figure, all_axes = panel_figure(len(panels), title)
    most = max(p.mean for of_panel in points for p in of_panel)
    norm = PowerNorm(0.5, 0, most or 1)
    for axes, panel, of_panel in zip(all_axes, panels, points, strict=True):
        _draw_cells(axes, of_panel, norm)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(name_of(plot.x))
        axes.set_ylabel(name_of(plot.line))
    spread = seeds_caption(points[0], "± standard deviation")
    set_caption(figure, f"{plot.metric.label}, percent; {spread}")
    return figure


def _draw_cells(axes: Axes, points: Sequence[Point], norm: PowerNorm) -> None:
    rows, columns = sorted({p.line for p in points}), sorted({p.x for p in points})
    means = np.full((len(rows), len(columns)), np.nan)
    for p in points:
        row, column = rows.index(p.line), columns.index(p.x)
        means[row, column] = p.mean
        axes.text(
            column,
            row,
            f"{100 * p.mean:.3g}" + ("" if p.std is None else f"\n± {100 * p.std:.2g}"),
            ha="center",
            va="center",
            fontsize=7,
            color="black" if norm(p.mean) > 0.5 else "white",
        )
    axes.imshow(means, cmap="cividis", norm=norm, aspect="auto")
    axes.set_xticks(range(len(columns)), [f"{x:g}" for x in columns])
    axes.set_yticks(range(len(rows)), [f"{y:g}" for y in rows])


def usage(plot: Plot, panels: Sequence[Panel], title: str | None) -> Figure:
    """
    Cumulative share of the selections, most used expert first.

    The metric is a list: the number of times that each expert was selected. The dotted line
    is a router that uses all experts alike.
    """
    (panel,) = panels
    num_experts = plot.where["num_experts"]
    shares = [
        [0, *np.sort(of_run)[::-1].cumsum()]
        for of_run in _shares(panel, num_experts, f"num_experts={num_experts}")
    ]
    figure, (axes,) = panel_figure(1, title)
    axes.plot([0, num_experts], [0, 1], ":", color="gray", linewidth=1)
    drawn = draw_curves(axes, panel.runs, shares, plot.line)
    finish_axes(axes, "experts, most used first")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel(plot.metric.label)
    add_legend(figure, plot.line)
    set_caption(figure, seeds_caption(drawn, "bands are standard deviations"))
    return figure


def overlaps(plot: Plot, panels: Sequence[Panel], title: str | None) -> Figure:
    """
    Histograms, a row of panels for each e and a column for each k.

    The metric is a list: the number (or share) of pairs of tokens that share 0, 1, ... k
    active latents. Shares of all pairs are drawn.
    """
    (panel,) = panels
    runs = panel.runs
    rows, columns = (
        sorted(set(runs[name].tolist())) for name in ("experts_per_token", "k")
    )
    figure = Figure(
        figsize=(1.2 + 2.6 * len(columns), 1.3 + 1.9 * len(rows)), layout="constrained"
    )
    grid = figure.subplots(
        len(rows), len(columns), squeeze=False, sharey=True, sharex="col"
    )
    drawn: list[Point] = []
    for i, e in enumerate(rows):
        for j, k in enumerate(columns):
            axes = grid[i, j]
            of_panel = runs.loc[(runs["experts_per_token"] == e) & (runs["k"] == k)]
            if len(of_panel):
                size = int(k) + 1
                shares = _shares(replace(panel, runs=of_panel), size, f"k + 1 = {size}")
                # Zero has no place on a logarithmic axis.
                shares = [np.where(of_run > 0, of_run, np.nan) for of_run in shares]
                drawn += draw_curves(axes, of_panel, shares, plot.line)
            axes.set_yscale("log")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            tidy(axes)
            axes.set_title(f"e = {e:g}, k = {k:g}", fontsize=9)
    add_legend(figure, plot.line, loc="outside upper right", ncols=2)
    figure.supylabel(plot.metric.label, fontsize=9)
    spread = seeds_caption(drawn, "bands are standard deviations")
    figure.supxlabel(f"latents that both tokens activate ({spread})", fontsize=9)
    set_title(figure, title)
    return figure


def _shares(panel: Panel, size: int, name: str) -> list[np.ndarray]:
    """Each run's counts, divided by their sum; refuse a list that is not of the size."""
    column = panel.metric.column
    shares = []
    for listed in panel.runs[column].tolist():
        counts = np.asarray(listed, dtype=float)
        if counts.shape != (size,) or counts.sum() <= 0:
            raise ValueError(
                f"{column} must be {name} counts with a positive sum, got {listed}"
            )
        shares.append(counts / counts.sum())
    return shares


def curves(plot: Plot, panels: Sequence[Panel], title: str | None) -> Figure:
    """
    The metric during training against CPU time and against training tokens, in two panels.

    A line is the mean over seeds, its band a standard deviation; the time of a point is
    the mean of the seeds'. Points that not all seeds of a label have reached are left out,
    and so is the SAE before it has seen any tokens: both axes are logarithmic.
    """
    (panel,) = panels
    metric = plot.metric.column
    runs = panel.runs.loc[panel.runs["tokens"] > 0]
    require_positive(runs[metric].tolist(), metric)
    figure, all_axes = panel_figure(2, title, share_y=True)
    drawn: list[Point] = []
    for label, style in line_styles(runs["label"].tolist(), "label").items():
        of_label = runs.loc[runs["label"] == label]
        times = over_seeds(of_label, "label", "tokens", "cpu_seconds")
        seconds = {p.x: p.mean for p in times}
        points = over_seeds(of_label, "label", "tokens", metric)
        num_seeds = len(set(of_label["seed"].tolist()))
        points = sorted((p for p in points if p.seeds == num_seeds), key=lambda p: p.x)
        if not points:
            raise ValueError(f"the seeds of {label!r} share no number of tokens")
        drawn += points
        mean, std = (np.array([getattr(p, n) for p in points]) for n in ("mean", "std"))
        x_values = [[seconds[p.x] for p in points], [p.x for p in points]]
        for axes, x in zip(all_axes, x_values, strict=True):
            draw_curve(axes, x, mean, std if num_seeds > 1 else None, style)
    for axes, x in zip(all_axes, ("cpu_seconds", "tokens"), strict=True):
        finish_axes(axes, x, plot.metric.scale)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    all_axes[0].set_ylabel(f"{plot.metric.label}, held-out")
    add_legend(figure, plot.line)
    set_caption(figure, seeds_caption(drawn, "bands are standard deviations"))
    return figure

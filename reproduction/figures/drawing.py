"""What the figures share: colours, axes, and lines with their spread over seeds."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import (
    AutoLocator,
    FormatStrFormatter,
    LogLocator,
    NullLocator,
)

from reproduction.paper import PaperFigure, paper_figure

from .records import Point, over_seeds, select

_NAMES = {
    "k": "active latents per token, k",
    "experts_per_token": "active experts per token, e",
    "quantile": "activation quantile",
    "seconds": "training time, seconds",
    "tokens": "training tokens",
    "mse": "squared error, sum over d_in",
    "mse_other_domain": "squared error, sum over d_in, other domain",
    "loss_recovered_other_domain": "loss recovered, other domain",
    "fvu": "fraction of variance unexplained",
    "autointerp_accuracy": "accuracy of the judge",
    "omega": "omega, mean over experts",
    "redundancy": "latents with a decoder cosine above 0.9",
    "activation_similarity_reduction": "reduction of activation similarity",
}
# Okabe and Ito's colours, which colour-blind readers tell apart, and some of Tol's, each with a
# marker.
_PALETTE = {
    "#0072B2": "o",
    "#56B4E9": "s",
    "#CC79A7": "D",
    "#D55E00": "^",
    "#000000": "v",
    "#E69F00": "P",
    "#009E73": "X",
    "#661100": ">",
    "#332288": "h",
    "#999933": "<",
    "#999999": "*",
    "#882255": "p",
    "#44AA99": "d",
    "#AA4499": "H",
    "#117733": "8",
    "#8A6D00": "4",
    "#DDAA33": "2",
    "#6699CC": "1",
}
# Whose colours these are: by first word, and Scale SAEs by their e.
_OWNERS = ["Scale 2", "Scale 4", "Scale 8", "Switch", "TopK", "Gated", "Full"]
# Columns of numbers, by their short names, and the number that gets the lightest colour,
# unless there is a larger one.
_ORDERED = {"experts_per_token": ("e", 16), "k": ("k", 128)}


@dataclass(frozen=True)
class LineStyle:
    """How a line is drawn, and what the legend calls it."""

    name: str
    color: str
    marker: str


def line_figure(
    runs: pd.DataFrame,
    x: str,
    metric: str,
    line: str,
    figure_number: str | None,
    *,
    title: str | None = None,
    log_y: bool = False,
) -> Figure:
    """
    Lines with the spread over seeds, and the paper's in a panel of their own beside them.

    Shares have linear axes, and the same in both panels. Errors have logarithmic ones that
    span the same factor in both: activations of another model have other norms, but equal
    ratios look equal.

    Args:
        runs: What :func:`.records.select` returned.
        x: Column of the horizontal axis.
        metric: Column of the vertical axis.
        line: Column that tells the lines apart.
        figure_number: The paper's figure to draw beside; None for none.
        title: Title of the figure.
        log_y: Whether the vertical axis is logarithmic.

    Returns:
        The figure.

    Raises:
        ValueError: If a point has two runs with the same seed, a number is infinite, or,
            where the axis is logarithmic, not positive.
    """
    points = over_seeds(runs, line, x, metric)
    if log_y:
        require_positive(runs[metric].tolist(), metric)
    paper = None if figure_number is None else paper_figure(figure_number)
    share_y = paper is not None and not log_y and metric.startswith(paper.metric)
    figure, panels = panel_figure(
        1 if paper is None else 2, title, share_x=True, share_y=share_y
    )
    draw_lines(panels[0], points, line)
    panels[0].set_ylabel(name_of(metric))
    if paper is not None:
        panels[0].set_title("measured", fontsize=10)
        panels[1].set_title(paper_title(paper), fontsize=10)
        of_paper = over_seeds(paper.results, line, x, paper.metric)
        draw_lines(panels[1], of_paper, line, linestyle="--")
        if not share_y:
            panels[1].set_ylabel(name_of(paper.metric))
    for axes in panels:
        finish_axes(axes, x, log_y)
    if log_y:
        _equal_ratios(panels)
    add_legend(figure, in_order=line in _ORDERED)
    set_caption(figure, seeds_caption(points, "bars are standard deviations"))
    return figure


def by_experts_figure(
    runs: pd.DataFrame,
    metric: str,
    num_experts: int | None,
    figure_number: str | None,
    *,
    title: str | None = None,
    log_y: bool = False,
) -> Figure:
    """A metric of SAEs without feature scaling against k, a line for each e."""
    runs = select(
        runs,
        ["experts_per_token", "k", "seed"],
        [metric],
        num_experts=num_experts,
        feature_scaling=False,
    )
    return line_figure(
        runs, "k", metric, "experts_per_token", figure_number, title=title, log_y=log_y
    )


def panel_figure(
    columns: int, title: str | None, share_x: bool = False, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of its own, not pyplot's: it leaves the caller's backend alone."""
    figure = Figure(figsize=(1.6 + 4.8 * columns, 4.4), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False, sharex=share_x, sharey=share_y)
    if title is not None:
        figure.suptitle(title, fontsize=11)
    return figure, [*panels[0]]


def draw_lines(
    axes: Axes, points: Sequence[Point], line: str, linestyle: str = "-"
) -> None:
    """Draw points, an error bar being a standard deviation."""
    for value, style in line_styles([p.line for p in points], line).items():
        of_line = [p for p in points if p.line == value]
        if not isinstance(of_line[0].x, str):
            of_line.sort(key=lambda p: p.x)
        axes.errorbar(
            [p.x for p in of_line],
            [p.mean for p in of_line],
            yerr=[p.std or 0 for p in of_line] if any(p.std for p in of_line) else None,
            label=style.name,
            color=style.color,
            marker=style.marker,
            markersize=5,
            linewidth=1.5,
            linestyle=linestyle,
            capsize=3,
        )


def draw_curves(
    axes: Axes, runs: pd.DataFrame, curves: Sequence[Sequence[float]], line: str
) -> list[Point]:
    """
    Draw whole curves, one for each run, as means with bands.

    Args:
        axes: Where.
        runs: A row for each run.
        curves: What each run has at 0, 1, 2, ...; NaN where nothing is to be drawn.
        line: Column that tells the lines apart.

    Returns:
        Each line as one point, whose ``seeds`` count.
    """
    points = over_seeds(runs.assign(one=1.0), line, "one", "one")
    lines = runs[line].tolist()
    for value, style in line_styles(lines, line).items():
        of_line = np.array(
            [y for y, of in zip(curves, lines, strict=True) if of == value]
        )
        mean = of_line.mean(axis=0)
        x = np.arange(len(mean))
        axes.plot(x, mean, color=style.color, label=style.name, linewidth=1.5)
        if len(of_line) > 1:
            draw_band(axes, x, mean, of_line.std(axis=0, ddof=1), style.color)
    return points


def draw_band(axes: Axes, x: Any, mean: Any, std: Any, color: str) -> None:
    """Shade a standard deviation above and below a mean."""
    axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)


def line_styles(values: Sequence[Any], column: str) -> dict[Any, LineStyle]:
    """
    Names and colours of lines, the same in every figure.

    Numbers of latents and experts go from dark to light. Of labels the paper's SAEs have
    colours of their own; others get what is left, in order.

    Args:
        values: What the column holds, repetitions included.
        column: Which column it is.

    Returns:
        The style of each value, in the order of the legend.
    """
    values = [*dict.fromkeys(values)]
    if column in _ORDERED:
        name, lightest = _ORDERED[column]
        markers = [*_PALETTE.values()]
        return {
            value: LineStyle(
                f"{name} = {value:g}",
                to_hex(
                    colormaps["viridis"](
                        0.9 * math.log(value) / math.log(max(lightest, *values))
                    )
                ),
                markers[round(math.log2(value)) % len(markers)],
            )
            for value in sorted(values)
        }
    if column == "feature_scaling":
        styles = {
            False: LineStyle("without feature scaling", "#D55E00", "^"),
            True: LineStyle("with feature scaling", "#0072B2", "o"),
        }
        return {value: styles[value] for value in sorted(values)}
    if len(values) > len(_PALETTE):
        raise ValueError(
            f"a figure can tell {len(_PALETTE)} lines apart, got {len(values)}: {values}"
        )
    colors = dict(zip(values, _PALETTE, strict=False))
    if column == "label":
        colors = _label_colors(values)
    return {
        value: LineStyle(value, colors[value], _PALETTE[colors[value]])
        for value in values
    }


def _label_colors(labels: Sequence[str]) -> dict[str, str]:
    own = dict(zip(_OWNERS, _PALETTE, strict=False))
    colors: dict[str, str] = {}
    for label in labels:
        words = re.split(r"\W+", label)
        color = own.get(f"{words[0]} {words[-1]}") or own.get(words[0])
        if color is not None and color not in colors.values():
            colors[label] = color
    free = (color for color in reversed(_PALETTE) if color not in colors.values())
    return colors | dict(
        zip((n for n in labels if n not in colors), free, strict=False)
    )


def finish_axes(axes: Axes, x: str, log_y: bool = False) -> None:
    """Scales, ticks and the name of the horizontal axis."""
    axes.set_xlabel(name_of(x))
    if x in _ORDERED:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    if log_y:
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        # Between neighbours of these there would be an axis without numbers.
        steps = LogLocator(subs=(1, 1.5, 2, 3, 5, 7))
        axes.yaxis.set_major_locator(AutoLocator() if top < 3 * bottom else steps)
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _equal_ratios(panels: Sequence[Axes]) -> None:
    limits = [axes.get_ylim() for axes in panels]
    factor = max(top / bottom for bottom, top in limits)
    for axes, (bottom, top) in zip(panels, limits, strict=True):
        middle = math.sqrt(bottom * top)
        axes.set_ylim(middle / math.sqrt(factor), middle * math.sqrt(factor))


def require_positive(values: Sequence[float], name: str) -> None:
    """Refuse what has no place on a logarithmic axis, or under a fraction."""
    if min(values) <= 0:
        raise ValueError(f"{name} must be positive, got {min(values)}")


def name_of(column: str) -> str:
    """What an axis calls a column."""
    return _NAMES.get(column, column.replace("_", " "))


def paper_title(paper: PaperFigure) -> str:
    """Title of a panel with the paper's numbers."""
    return "paper (GPT-2 small" + (f", {paper.dataset})" if paper.dataset else ")")


def seeds_caption(points: Sequence[Point], spread: str) -> str:
    """Of how many seeds points are means; ``spread`` says how the figure shows theirs."""
    fewest, most = (f(p.seeds for p in points) for f in (min, max))
    if most == 1:
        return "1 seed"
    some = f"{most}" if fewest == most else f"{fewest} to {most}"
    return f"mean over {some} seeds; {spread}"


def set_caption(figure: Figure, text: str) -> None:
    """Small print below a figure."""
    figure.supxlabel(text, fontsize=8, color="dimgray")


def add_legend(
    figure: Figure,
    loc: Literal["outside right upper", "outside upper right"] = "outside right upper",
    ncols: int = 1,
    in_order: bool = False,
) -> None:
    """
    One legend beside all panels, in which each name is there once.

    Args:
        figure: Where.
        loc: Where in it.
        ncols: Number of columns.
        in_order: Sort by the numbers with which the names end.
    """
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    names = [*handles]
    if in_order:
        names.sort(key=lambda name: float(name.split()[-1]))
    figure.legend(
        [handles[name] for name in names],
        names,
        fontsize=8,
        frameon=False,
        loc=loc,
        ncols=ncols,
    )

"""Parts that the figures share: colours, axes, and lines with their spread over seeds."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    PercentFormatter,
    SymmetricalLogLocator,
)

from .points import Point, over_seeds

# Names of the horizontal axes.
_NAMES = {
    "k": "active latents per token, k",
    "experts_per_token": "active experts per token, e",
    "quantile": "activation quantile",
    "cpu_seconds": "training time, seconds",
    "tokens": "training tokens",
    "training_flops": "FLOPs of a training step per token",
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
# Starts of the paper's labels, Scale SAEs with their e: the palette's first colours are theirs.
_OF_PAPER = ["Scale 2", "Scale 4", "Scale 8", "Switch", "TopK", "Gated", "Full"]
# Columns of numbers, by their short names, and the number that gets the lightest colour,
# unless there is a larger one.
_ORDERED = {"experts_per_token": ("e", 16), "k": ("k", 128)}


@dataclass(frozen=True)
class LineStyle:
    """Name of a line in the legend, and its look."""

    name: str
    color: str
    marker: str


def panel_figure(
    columns: int, title: str | None, share_x: bool = False, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with panels in a row."""
    # A figure of its own, not pyplot's: it leaves the caller's backend alone.
    figure = Figure(figsize=(1.6 + 4.8 * columns, 4.4), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False, sharex=share_x, sharey=share_y)
    set_title(figure, title)
    return figure, [*panels[0]]


def set_title(figure: Figure, title: str | None) -> None:
    """Put a title above a figure, unless it has none; a dollar sign begins no formula."""
    if title is not None:
        figure.suptitle(title, fontsize=11, parse_math=False)


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
    axes: Axes, runs: pd.DataFrame, curves: Sequence[Any], line: str
) -> list[Point]:
    """
    Draw whole curves, one for each run, as means with bands: lists of the values at 0, 1, 2, ...,
    of which NaN is not drawn. Returns a point for each line, for :func:`seeds_caption`.
    """
    points = over_seeds(runs.assign(one=1.0), line, "one", "one")
    lines = runs[line].tolist()
    for value, style in line_styles(lines, line).items():
        of_line = np.array(
            [y for y, of in zip(curves, lines, strict=True) if of == value]
        )
        mean = of_line.mean(axis=0)
        std = of_line.std(axis=0, ddof=1) if len(of_line) > 1 else None
        draw_curve(axes, range(len(mean)), mean, std, style)
    return points


def draw_curve(axes: Axes, x: Any, mean: Any, std: Any, style: LineStyle) -> None:
    """Draw a mean, and around it a band of a standard deviation unless that is None."""
    axes.plot(x, mean, color=style.color, label=style.name, linewidth=1.5)
    if std is not None:
        low, high = mean - std, mean + std
        axes.fill_between(x, low, high, color=style.color, alpha=0.2, linewidth=0)


def line_styles(values: Sequence[Any], column: str) -> dict[Any, LineStyle]:
    """
    Names and colours of the values of a column, the same in every figure, in the order of the
    legend.

    Numbers of latents and experts go from dark to light. Labels of the paper's SAEs have
    colours of their own; other labels get the remaining ones, in order.
    """
    values = [*dict.fromkeys(values)]
    if column in _ORDERED:
        name, lightest = _ORDERED[column]
        steps, markers = math.log(max(lightest, *values)), [*_PALETTE.values()]
        return {
            value: LineStyle(
                f"{name} = {value:g}",
                to_hex(colormaps["viridis"](0.9 * math.log(value) / steps)),
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
    own = dict(zip(_OF_PAPER, _PALETTE, strict=False))
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


def finish_axes(axes: Axes, x: str, scale: str = "linear") -> None:
    """
    Set the scales and ticks, and name the horizontal axis, by a column or in words; the vertical
    one has a scale of :class:`.kinds.Metric`.
    """
    axes.set_xlabel(name_of(x))
    if x in _ORDERED:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    tidy(axes)
    if scale == "log":
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        # Between neighbours of these there would be an axis without numbers.
        steps = LogLocator(subs=(1, 1.5, 2, 3, 5, 7))
        axes.yaxis.set_major_locator(AutoLocator() if top < 3 * bottom else steps)
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    elif scale == "share":
        # Often zero, and differing by powers of ten where they are not.
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_ylim(-1e-4, max(1.5 * axes.get_ylim()[1], 2e-3))
        ticks = SymmetricalLogLocator(base=10, linthresh=1e-3, subs=(1, 2, 5))
        axes.yaxis.set_major_locator(ticks)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    elif scale == "percent":
        axes.axhline(0, color="gray", linewidth=1)
        axes.yaxis.set_major_formatter(PercentFormatter())


def tidy(axes: Axes) -> None:
    """Add a faint grid, and leave out two sides of the frame."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def equalize_ratios(panels: Sequence[Axes]) -> None:
    """Let logarithmic vertical axes span the same factor, around their own middles."""
    limits = [axes.get_ylim() for axes in panels]
    factor = max(top / bottom for bottom, top in limits)
    for axes, (bottom, top) in zip(panels, limits, strict=True):
        middle = math.sqrt(bottom * top)
        axes.set_ylim(middle / math.sqrt(factor), middle * math.sqrt(factor))


def name_of(column: str) -> str:
    """Name of an axis: a column's, in words."""
    return _NAMES.get(column, column.replace("_", " "))


def seeds_caption(points: Sequence[Point], spread: str) -> str:
    """Number of seeds that points are means over, and ``spread`` if there are several."""
    fewest, most = (f(p.seeds for p in points) for f in (min, max))
    if most == 1:
        return "1 seed"
    some = f"{most}" if fewest == most else f"{fewest} to {most}"
    return f"mean over {some} seeds; {spread}"


def set_caption(figure: Figure, text: str) -> None:
    """Put small print below a figure."""
    figure.supxlabel(text, fontsize=8, color="dimgray")


def add_legend(figure: Figure, line: str, **place: Any) -> None:
    """
    Add one legend for all panels, with each name once, on the right unless ``place`` (of
    ``Figure.legend``) says otherwise. Numbers, of any panel, are put in order.
    """
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    names = [*handles]
    if line in _ORDERED:
        names.sort(key=lambda name: float(name.split()[-1]))
    place = {"loc": "outside right upper", **place}
    lines = [handles[name] for name in names]
    legend = figure.legend(lines, names, fontsize=8, frameon=False, **place)
    for text in legend.get_texts():
        # Names are what runs are called: a dollar sign begins no formula.
        text.set_parse_math(False)

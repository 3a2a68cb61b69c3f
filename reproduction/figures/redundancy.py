"""How much latents repeat each other: figures 7, 8 and 11 of the paper."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, SymmetricalLogLocator

from reproduction.paper import paper_figure

from .drawing import (
    add_legend,
    by_experts_figure,
    draw_curves,
    line_figure,
    name_of,
    panel_figure,
    paper_title,
    require_positive,
    seeds_caption,
    set_caption,
)
from .records import Point, over_seeds, select, with_mean_decomposition


def plot_similarity_reduction(
    runs: pd.DataFrame,
    *,
    metric: str = "activation_similarity",
    num_experts: int | None = 64,
    paper: bool = False,
    title: str | None = None,
) -> Figure:
    """
    Percent by which feature scaling lowers the activation similarity (figure 7a).

    A run with feature scaling is compared with the one that has the same e, k and seed but
    no feature scaling; runs without such a partner are left out.

    Args:
        runs: A row for each run.
        metric: The column that is lowered.
        num_experts: Draw SAEs with so many experts; any if None.
        paper: Whether to draw the paper's numbers beside.
        title: Title of the figure.

    Returns:
        The figure, against k, with a line for each e.

    Raises:
        ValueError: If nothing is there to draw, a column is missing, or a similarity to
            compare with is not positive.
    """
    key = ["experts_per_token", "k", "seed"]
    runs = select(
        with_mean_decomposition(runs),
        [*key, "feature_scaling"],
        [metric],
        num_experts=num_experts,
    )
    scaled, plain = (
        runs.loc[runs["feature_scaling"] == on, [*key, metric]] for on in (True, False)
    )
    for half in (scaled, plain):
        over_seeds(half, "experts_per_token", "k", metric)  # For its check.
    pairs = scaled.merge(plain, on=key, suffixes=("", "_without"))
    if pairs.empty:
        raise ValueError(
            "runs must have runs with and without feature scaling, got none"
        )
    without = pairs[f"{metric}_without"]
    require_positive(without.tolist(), f"{metric} without feature scaling")
    name = f"{metric}_reduction"
    pairs = pairs.assign(**{name: 100 * (1 - pairs[metric] / without)})
    numbers = "7a" if paper else None
    figure = line_figure(pairs, "k", name, "experts_per_token", numbers, title=title)
    for axes in figure.axes:
        axes.axhline(0, color="gray", linewidth=1)
        axes.yaxis.set_major_formatter(PercentFormatter())
    return figure


def plot_activation_similarity(
    runs: pd.DataFrame,
    *,
    metric: str = "activation_similarity",
    num_experts: int | None = 64,
    paper: bool = False,
    title: str | None = None,
) -> Figure:
    """
    Activation similarity (equation A.3) without feature scaling (figure 7b).

    Args:
        runs: A row for each run.
        metric: The column to draw.
        num_experts: Draw SAEs with so many experts; any if None.
        paper: Whether to draw the paper's numbers beside.
        title: Title of the figure.

    Returns:
        The figure, against k, with a line for each e.

    Raises:
        ValueError: If nothing is there to draw, or a column is missing.
    """
    numbers = "7b" if paper else None
    return by_experts_figure(runs, metric, num_experts, numbers, title=title)


def plot_redundancy(
    runs: pd.DataFrame,
    *,
    metric: str = "redundancy",
    labels: Sequence[str] | None = None,
    paper: bool = False,
    title: str | None = None,
) -> Figure:
    """
    Share of redundant latents against k, a line for each label (section 3.3.1).

    The axis is linear up to 0.1 % and logarithmic above.

    Args:
        runs: A row for each run.
        metric: The column to draw, as a share.
        labels: Draw these only, in this order.
        paper: Whether to draw the paper's numbers, of Switch and Scale SAE, beside.
        title: Title of the figure.

    Returns:
        The figure.

    Raises:
        ValueError: If nothing is there to draw, or a column or label is missing.
    """
    runs = select(runs, ["label", "k", "seed"], [metric], labels)
    numbers = "redundancy" if paper else None
    figure = line_figure(runs, "k", metric, "label", numbers, title=title)
    _show_shares(figure)
    return figure


def plot_redundancy_by_experts(
    runs: pd.DataFrame,
    *,
    metric: str = "redundancy",
    num_experts: int | None = 64,
    paper: bool = False,
    title: str | None = None,
) -> Figure:
    """
    Share of redundant latents without feature scaling, by e and k (figure 8a).

    Args:
        runs: A row for each run.
        metric: The column to draw, as a share.
        num_experts: Draw SAEs with so many experts; any if None.
        paper: Whether to draw the paper's numbers beside, in the same colours.
        title: Title of the figure.

    Returns:
        The figure, whose cells hold mean and standard deviation in percent.

    Raises:
        ValueError: If nothing is there to draw, or a column is missing.
    """
    runs = select(
        runs,
        ["experts_per_token", "k", "seed"],
        [metric],
        num_experts=num_experts,
        feature_scaling=False,
    )
    points = over_seeds(runs, "experts_per_token", "k", metric)
    tables = {"measured" if paper else "": points}
    if paper:
        numbers = paper_figure("8a")
        tables[paper_title(numbers)] = over_seeds(
            numbers.results, "experts_per_token", "k", numbers.metric
        )
    figure, panels = panel_figure(len(tables), title)
    most = max(p.mean for table in tables.values() for p in table)
    norm = PowerNorm(0.5, 0, most or 1)
    for axes, (name, table) in zip(panels, tables.items(), strict=True):
        _draw_cells(axes, table, norm)
        axes.set_title(name, fontsize=10)
    set_caption(
        figure,
        f"{name_of(metric)}, percent; {seeds_caption(points, '± standard deviation')}",
    )
    return figure


def plot_redundancy_with_scaling(
    runs: pd.DataFrame,
    *,
    metric: str = "redundancy",
    k: float = 16,
    num_experts: int | None = 64,
    title: str | None = None,
) -> Figure:
    """
    Share of redundant latents with and without feature scaling against e (figure 8b).

    The axis is linear up to 0.1 % and logarithmic above.

    Args:
        runs: A row for each run.
        metric: The column to draw, as a share.
        k: Draw SAEs with so many active latents.
        num_experts: And so many experts; any if None.
        title: Title of the figure.

    Returns:
        The figure.

    Raises:
        ValueError: If nothing is there to draw, or a column is missing.
    """
    runs = select(
        with_mean_decomposition(runs),
        ["experts_per_token", "feature_scaling", "seed"],
        [metric],
        num_experts=num_experts,
        k=k,
    )
    figure = line_figure(
        runs, "experts_per_token", metric, "feature_scaling", None, title=title
    )
    _show_shares(figure)
    return figure


def plot_overlap_histogram(
    runs: pd.DataFrame,
    *,
    num_experts: int | None = 64,
    title: str | None = None,
) -> Figure:
    """
    How many active latents two tokens share, with and without feature scaling (figure 11).

    A row of panels for each e, a column for each k.

    Args:
        runs: A row for each run, with the column "overlap_histogram": how many pairs of
            tokens share 0, 1, ... k latents, a list of counts or shares.
        num_experts: Draw SAEs with so many experts; any if None.
        title: Title of the figure.

    Returns:
        The figure; shares of all pairs, on a logarithmic axis.

    Raises:
        ValueError: If nothing is there to draw, a column is missing, or a histogram has
            not k + 1 entries with a positive sum.
    """
    runs = select(
        with_mean_decomposition(runs),
        ["experts_per_token", "k", "feature_scaling", "seed"],
        ["overlap_histogram"],
        num_experts=num_experts,
    )
    rows, columns = (
        sorted(set(runs[name].tolist())) for name in ("experts_per_token", "k")
    )
    figure = Figure(
        figsize=(1.2 + 2.6 * len(columns), 1.3 + 1.9 * len(rows)), layout="constrained"
    )
    panels = figure.subplots(
        len(rows), len(columns), squeeze=False, sharey=True, sharex="col"
    )
    lines: list[Point] = []
    for i, e in enumerate(rows):
        for j, k in enumerate(columns):
            axes = panels[i, j]
            of_panel = runs.loc[(runs["experts_per_token"] == e) & (runs["k"] == k)]
            if len(of_panel):
                lines += _draw_overlaps(axes, of_panel, int(k))
            axes.set_yscale("log")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(f"e = {e:g}, k = {k:g}", fontsize=9)
    add_legend(figure, loc="outside upper right", ncols=2)
    figure.supylabel("share of pairs of tokens", fontsize=9)
    figure.supxlabel(
        f"latents that both tokens activate ({seeds_caption(lines, 'bands are standard deviations')})",
        fontsize=9,
    )
    if title is not None:
        figure.suptitle(title, fontsize=11)
    return figure


def _show_shares(figure: Figure) -> None:
    """Percentages that are often zero, and differ by powers of ten where they are not."""
    for axes in figure.axes:
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_ylim(-1e-4, max(1.5 * axes.get_ylim()[1], 2e-3))
        ticks = SymmetricalLogLocator(base=10, linthresh=1e-3, subs=(1, 2, 5))
        axes.yaxis.set_major_locator(ticks)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")


def _draw_overlaps(axes: Axes, runs: pd.DataFrame, k: int) -> list[Point]:
    shares = []
    for histogram in runs["overlap_histogram"].tolist():
        pairs = np.asarray(histogram, dtype=float)
        if pairs.shape != (k + 1,) or pairs.sum() <= 0:
            raise ValueError(
                f"overlap_histogram must have k + 1 = {k + 1} entries with a positive "
                f"sum, got {histogram}"
            )
        # What no pair has is not drawn: zero has no place on a logarithmic axis.
        shares.append(np.where(pairs > 0, pairs / pairs.sum(), np.nan))
    return draw_curves(axes, runs, shares, "feature_scaling")


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
    axes.set_xticks(range(len(columns)), [f"{k:g}" for k in columns])
    axes.set_yticks(range(len(rows)), [f"{e:g}" for e in rows])
    axes.set_xlabel(name_of("k"))
    axes.set_ylabel(name_of("experts_per_token"))

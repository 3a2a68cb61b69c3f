"""How well SAEs reconstruct: figures 3, 4, 5 and 10 of the paper, and learning curves."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from .drawing import (
    add_legend,
    by_experts_figure,
    draw_band,
    finish_axes,
    line_figure,
    line_styles,
    name_of,
    panel_figure,
    require_positive,
    seeds_caption,
    set_caption,
)
from .records import Point, over_seeds, select, with_mean_decomposition


def plot_mse(
    runs: pd.DataFrame,
    *,
    metric: str = "mse",
    labels: Sequence[str] | None = None,
    paper: bool = False,
    title: str | None = None,
) -> Figure:
    """
    Reconstruction error against k, a line for each label (figure 3a).

    Args:
        runs: A row for each run; see :mod:`reproduction.figures`.
        metric: The column to draw; "fvu", say. Its numbers must be positive.
        labels: Draw these only, in this order.
        paper: Whether to draw the paper's numbers beside.
        title: Title of the figure.

    Returns:
        The figure; save it with ``savefig``. Both error axes are logarithmic and span the
        same factor: equal ratios look equal in both.

    Raises:
        ValueError: If nothing is there to draw, or a column or label is missing.
    """
    return _against_k(runs, metric, labels, "3a" if paper else None, title, True)


def plot_mse_other_domain(
    runs: pd.DataFrame,
    *,
    metric: str = "mse_other_domain",
    labels: Sequence[str] | None = None,
    paper: bool = False,
    title: str | None = None,
) -> Figure:
    """
    Reconstruction error on text of another domain (figure 3b); see :func:`plot_mse`.

    Args:
        runs: A row for each run.
        metric: The column to draw. Its numbers must be positive.
        labels: Draw these only, in this order.
        paper: Whether to draw the paper's numbers, of HLE-Biomedical, beside.
        title: Title of the figure.

    Returns:
        The figure.

    Raises:
        ValueError: If nothing is there to draw, or a column or label is missing.
    """
    return _against_k(runs, metric, labels, "3b" if paper else None, title, True)


def plot_loss_recovered(
    runs: pd.DataFrame,
    *,
    metric: str = "loss_recovered",
    labels: Sequence[str] | None = None,
    paper: bool = False,
    title: str | None = None,
) -> Figure:
    """
    Loss recovered (equation A.2) against k, a line for each label (figure 3c).

    Args:
        runs: A row for each run.
        metric: The column to draw.
        labels: Draw these only, in this order.
        paper: Whether to draw the paper's numbers, of HLE-Biomedical, beside.
        title: Title of the figure.

    Returns:
        The figure.

    Raises:
        ValueError: If nothing is there to draw, or a column or label is missing.
    """
    return _against_k(runs, metric, labels, "3c" if paper else None, title, False)


def plot_autointerp(
    scores: pd.DataFrame,
    *,
    metric: str = "autointerp_accuracy",
    labels: Sequence[str] | None = None,
    paper: bool = False,
    title: str | None = None,
) -> Figure:
    """
    Accuracy of automated interpretability by activation quantile (figure 3d).

    Args:
        scores: A row for each run and quantile, with the columns "label", "seed",
            "quantile" (strings, in the order of the axis) and the metric.
        metric: The column to draw.
        labels: Draw these only, in this order.
        paper: Whether to draw the paper's numbers, of another judge, beside.
        title: Title of the figure.

    Returns:
        The figure.

    Raises:
        ValueError: If nothing is there to draw, or a column or label is missing.
    """
    scores = select(scores, ["label", "seed", "quantile"], [metric], labels)
    numbers = "3d" if paper else None
    return line_figure(scores, "quantile", metric, "label", numbers, title=title)


def plot_mse_by_experts(
    runs: pd.DataFrame,
    *,
    metric: str = "mse",
    num_experts: int | None = 64,
    paper: bool = False,
    title: str | None = None,
) -> Figure:
    """
    Reconstruction error without feature scaling against k, a line for each e (figure 4a).

    Figure 4b is the same for another domain, whose numbers the paper's scripts lack.

    Args:
        runs: A row for each run.
        metric: The column to draw. Its numbers must be positive.
        num_experts: Draw SAEs with so many experts; any if None.
        paper: Whether to draw the paper's numbers beside.
        title: Title of the figure.

    Returns:
        The figure.

    Raises:
        ValueError: If nothing is there to draw, or a column is missing.
    """
    numbers = "4a" if paper else None
    return by_experts_figure(
        runs, metric, num_experts, numbers, title=title, log_y=True
    )


def plot_loss_recovered_by_experts(
    runs: pd.DataFrame,
    *,
    metric: str = "loss_recovered",
    num_experts: int | None = 64,
    paper: bool = False,
    title: str | None = None,
) -> Figure:
    """
    Loss recovered without feature scaling against k, a line for each e (figure 4c).

    Args:
        runs: A row for each run.
        metric: The column to draw.
        num_experts: Draw SAEs with so many experts; any if None.
        paper: Whether to draw the paper's numbers beside.
        title: Title of the figure.

    Returns:
        The figure.

    Raises:
        ValueError: If nothing is there to draw, or a column is missing.
    """
    numbers = "4c" if paper else None
    return by_experts_figure(runs, metric, num_experts, numbers, title=title)


def plot_mse_with_scaling_by_experts(
    runs: pd.DataFrame,
    *,
    metric: str = "mse",
    num_experts: int | None = 64,
    paper: bool = False,
    title: str | None = None,
) -> Figure:
    """
    Reconstruction error with feature scaling against e, a line for each k (figure 5a).

    Args:
        runs: A row for each run.
        metric: The column to draw. Its numbers must be positive.
        num_experts: Draw SAEs with so many experts; any if None.
        paper: Whether to draw the paper's numbers beside.
        title: Title of the figure.

    Returns:
        The figure.

    Raises:
        ValueError: If nothing is there to draw, or a column is missing.
    """
    runs = select(
        with_mean_decomposition(runs),
        ["experts_per_token", "k", "seed"],
        [metric],
        num_experts=num_experts,
        feature_scaling=True,
    )
    return line_figure(
        runs,
        "experts_per_token",
        metric,
        "k",
        "5a" if paper else None,
        title=title,
        log_y=True,
    )


def plot_scaling_effect(
    runs: pd.DataFrame,
    *,
    metric: str = "mse",
    num_experts: int | None = 64,
    experts_per_token: int = 16,
    paper: bool = False,
    title: str | None = None,
) -> Figure:
    """
    Reconstruction error with and without feature scaling against k (figure 5b).

    Args:
        runs: A row for each run.
        metric: The column to draw. Its numbers must be positive.
        num_experts: Draw SAEs with so many experts; any if None.
        experts_per_token: And so many of them active. The paper's numbers are for 16.
        paper: Whether to draw the paper's numbers beside.
        title: Title of the figure.

    Returns:
        The figure.

    Raises:
        ValueError: If nothing is there to draw, or a column is missing.
    """
    runs = select(
        with_mean_decomposition(runs),
        ["feature_scaling", "k", "seed"],
        [metric],
        num_experts=num_experts,
        experts_per_token=experts_per_token,
    )
    return line_figure(
        runs,
        "k",
        metric,
        "feature_scaling",
        "5b" if paper else None,
        title=title,
        log_y=True,
    )


def plot_decompositions(
    runs: pd.DataFrame,
    *,
    metric: str = "mse",
    num_experts: int = 64,
    experts_per_token: int = 2,
    paper: bool = False,
    title: str | None = None,
) -> Figure:
    """
    Reconstruction error of the three decompositions against k (figure 10).

    Args:
        runs: A row for each run.
        metric: The column to draw. Its numbers must be positive.
        num_experts: Draw SAEs with so many experts. The paper's numbers are for 256/8.
        experts_per_token: And so many of them active.
        paper: Whether to draw the paper's numbers beside.
        title: Title of the figure.

    Returns:
        The figure.

    Raises:
        ValueError: If nothing is there to draw, or a column is missing.
    """
    runs = select(
        runs,
        ["decomposition", "k", "seed"],
        [metric],
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        feature_scaling=True,
    )
    return line_figure(
        runs,
        "k",
        metric,
        "decomposition",
        "10" if paper else None,
        title=title,
        log_y=True,
    )


def plot_learning_curves(
    curves: pd.DataFrame,
    *,
    metric: str = "fvu",
    labels: Sequence[str] | None = None,
    k: float | None = None,
    title: str | None = None,
) -> Figure:
    """
    Held-out error against training time and against training tokens, in two panels.

    A line is the mean over seeds, its band a standard deviation; the time of a point is
    the mean of the seeds'. Left out are points that not all seeds of a label have reached,
    and what an SAE is before it has seen any tokens: both axes are logarithmic.

    Args:
        curves: A row for each measurement during training, with the columns "label",
            "seed", "tokens", "seconds" and the metric.
        metric: The column to draw. Its numbers must be positive.
        labels: Draw these only, in this order.
        k: Draw SAEs with so many active latents, by the column "k"; any if None.
        title: Title of the figure.

    Returns:
        The figure.

    Raises:
        ValueError: If nothing is there to draw, a column or label is missing, or the
            seeds of a label were never measured at the same tokens.
    """
    key = ["label", "tokens", "seed"]
    curves = select(curves, key, ["seconds", metric], labels, k=k)
    curves = curves.loc[curves["tokens"] > 0]
    require_positive(curves[metric].tolist(), metric)
    figure, panels = panel_figure(2, title, share_y=True)
    drawn: list[Point] = []
    for label, style in line_styles(curves["label"].tolist(), "label").items():
        of_label = curves.loc[curves["label"] == label]
        seconds = {
            p.x: p.mean for p in over_seeds(of_label, "label", "tokens", "seconds")
        }
        points = over_seeds(of_label, "label", "tokens", metric)
        num_seeds = len(set(of_label["seed"].tolist()))
        points = sorted((p for p in points if p.seeds == num_seeds), key=lambda p: p.x)
        if not points:
            raise ValueError(f"the seeds of {label!r} share no number of tokens")
        drawn += points
        mean, std = (np.array([getattr(p, n) for p in points]) for n in ("mean", "std"))
        x_values = [[seconds[p.x] for p in points], [p.x for p in points]]
        for axes, x in zip(panels, x_values, strict=True):
            axes.plot(x, mean, color=style.color, label=style.name, linewidth=1.5)
            if num_seeds > 1:
                draw_band(axes, x, mean, std, style.color)
    for axes, x in zip(panels, ("seconds", "tokens"), strict=True):
        finish_axes(axes, x, log_y=True)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0].set_ylabel(f"{name_of(metric)}, held-out")
    add_legend(figure)
    set_caption(figure, seeds_caption(drawn, "bands are standard deviations"))
    return figure


def _against_k(
    runs: pd.DataFrame,
    metric: str,
    labels: Sequence[str] | None,
    figure_number: str | None,
    title: str | None,
    log_y: bool,
) -> Figure:
    runs = select(runs, ["label", "k", "seed"], [metric], labels)
    return line_figure(
        runs, "k", metric, "label", figure_number, title=title, log_y=log_y
    )

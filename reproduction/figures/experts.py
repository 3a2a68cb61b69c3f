"""What experts learned: figures 2 and 6 of the paper."""

from statistics import mean

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .drawing import (
    add_legend,
    draw_curves,
    finish_axes,
    line_figure,
    panel_figure,
    seeds_caption,
    set_caption,
)
from .records import select, with_mean_decomposition


def plot_scaling_factors(
    runs: pd.DataFrame,
    *,
    num_experts: int | None = 64,
    paper: bool = False,
    title: str | None = None,
) -> Figure:
    """
    Omega, its mean over experts, against e, a line for each k (figure 2).

    Args:
        runs: A row for each run, with the column "scaling_factors": each expert's omega, a
            list.
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
        ["scaling_factors"],
        num_experts=num_experts,
        feature_scaling=True,
    )
    runs = runs.assign(omega=[mean(factors) for factors in runs["scaling_factors"]])
    numbers = "2" if paper else None
    return line_figure(runs, "experts_per_token", "omega", "k", numbers, title=title)


def plot_expert_similarity(
    runs: pd.DataFrame,
    *,
    k: float = 32,
    num_experts: int | None = 64,
    feature_scaling: bool = False,
    title: str | None = None,
) -> Figure:
    """
    Similarity within experts and between them, against e (figure 6a).

    Args:
        runs: A row for each run, with the columns "intra_expert_similarity" and
            "inter_expert_similarity".
        k: Draw SAEs with so many active latents.
        num_experts: And so many experts; any if None.
        feature_scaling: And with feature scaling, or without.
        title: Title of the figure.

    Returns:
        The figure.

    Raises:
        ValueError: If nothing is there to draw, or a column is missing.
    """
    columns = {
        "intra_expert_similarity": "within an expert",
        "inter_expert_similarity": "sampled from all experts",
    }
    runs = select(
        with_mean_decomposition(runs),
        ["experts_per_token", "seed"],
        [*columns],
        num_experts=num_experts,
        k=k,
        feature_scaling=feature_scaling,
    )
    similarities = runs.melt(
        ["experts_per_token", "seed"],
        [*columns],
        var_name="latents",
        value_name="cosine_similarity_of_latents",
    ).replace({"latents": columns})
    return line_figure(
        similarities,
        "experts_per_token",
        "cosine_similarity_of_latents",
        "latents",
        None,
        title=title,
    )


def plot_expert_usage(
    runs: pd.DataFrame,
    *,
    k: float = 32,
    num_experts: int = 64,
    feature_scaling: bool = True,
    title: str | None = None,
) -> Figure:
    """
    Cumulative share of the selections, most used expert first, a line for each e (figure 6b).

    The dotted line is a router that uses all experts alike.

    Args:
        runs: A row for each run, with the column "expert_counts": how often each expert
            was selected, a list.
        k: Draw SAEs with so many active latents.
        num_experts: And so many experts.
        feature_scaling: And with feature scaling, or without.
        title: Title of the figure.

    Returns:
        The figure.

    Raises:
        ValueError: If nothing is there to draw, a column is missing, or counts are not
            ``num_experts`` numbers with a positive sum.
    """
    runs = select(
        with_mean_decomposition(runs),
        ["experts_per_token", "seed"],
        ["expert_counts"],
        num_experts=num_experts,
        k=k,
        feature_scaling=feature_scaling,
    )
    shares = []
    for counts in runs["expert_counts"].tolist():
        most_first = np.sort(np.asarray(counts, dtype=float))[::-1]
        if most_first.shape != (num_experts,) or most_first.sum() <= 0:
            raise ValueError(
                f"expert_counts must be num_experts={num_experts} counts with a positive "
                f"sum, got {counts}"
            )
        shares.append([0, *most_first.cumsum() / most_first.sum()])
    figure, (axes,) = panel_figure(1, title)
    axes.plot([0, num_experts], [0, 1], ":", color="gray", linewidth=1)
    lines = draw_curves(axes, runs, shares, "experts_per_token")
    finish_axes(axes, "experts, most used first")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("cumulative share of selections")
    add_legend(figure)
    set_caption(figure, seeds_caption(lines, "bands are standard deviations"))
    return figure

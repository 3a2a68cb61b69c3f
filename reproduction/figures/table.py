"""The table of the figures: a metric, its axis, its kind of plot and the paper's figure."""

from dataclasses import replace
from statistics import mean
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from reproduction.paper import paper_figure

from .kinds import Metric, Panel, Plot, cells, costs, curves, lines, overlaps, usage
from .points import over_seeds, require_positive, select, with_mean_decomposition


def _mean_omega(runs: pd.DataFrame) -> pd.DataFrame:
    return runs.assign(omega=[mean(factors) for factors in runs["scaling_factors"]])


def _similarity_reduction(runs: pd.DataFrame) -> pd.DataFrame:
    """
    Compare runs with feature scaling to those of the same e, k and seed without, if there are
    any.
    """
    metric = "activation_similarity"
    key = ["experts_per_token", "k", "seed"]
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
    return pairs.assign(
        activation_similarity_reduction=100 * (1 - pairs[metric] / without)
    )


def _best_of_each(runs: pd.DataFrame) -> pd.DataFrame:
    """The best of each architecture, by names for people who do not know the others."""
    names = {
        "Scale 256/8 1 shared early decay revival": "Scale SAE 256/8",
        "Scale 512/16 Multi-TopK": "Scale SAE 512/16",
        "Switch 32 Multi-TopK": "Switch SAE",
        "TopK 576": "dense, 576 latents",
        "Full TopK 18432": "dense, 18,432 latents",
    }
    runs = runs.loc[runs["label"].isin([*names])]
    return runs.assign(label=[names[label] for label in runs["label"]])


def _both_similarities(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each of a run's similarities: within an expert, and of all latents."""
    names = {
        "intra_expert_similarity": "within an expert",
        "inter_expert_similarity": "sampled from all experts",
    }
    return runs.rename(columns=names).melt(
        ["experts_per_token", "seed"],
        [*names.values()],
        var_name="latents",
        value_name="cosine_similarity_of_latents",
    )


# Metrics of several figures.
_MSE = Metric("mse", "squared error, sum over d_in", "log")
_MSE_OTHER_DOMAIN = Metric(
    "mse_other_domain", "squared error, sum over d_in, other domain", "log"
)
# Equation A.2 of the paper.
_LOSS = Metric("loss_recovered", "loss recovered")
_LOSS_OTHER_DOMAIN = Metric(
    "loss_recovered_other_domain", "loss recovered, other domain"
)
# Section 3.3.1.
_REDUNDANCY = Metric("redundancy", "latents with a decoder cosine above 0.9", "share")
# Conditions and axes of several figures.
_OF_64: dict[str, Any] = {"num_experts": 64}
_UNSCALED = {**_OF_64, "feature_scaling": False}
_SCALED = {**_OF_64, "feature_scaling": True, "decomposition": "mean"}
_LINE_FOR_EACH_E: dict[str, Any] = {
    "line": "experts_per_token",
    "where": _UNSCALED,
    "source": "experts",
}
_AGAINST_E: dict[str, Any] = {
    "line": "k",
    "x": "experts_per_token",
    "where": _SCALED,
    "source": "experts",
}

# By the name of the picture's file; numbers are the paper's.
FIGURES: dict[str, Plot] = {
    "figure-2": Plot(
        lines,
        Metric("omega", "omega, mean over experts"),
        paper="2",
        needs=("experts_per_token", "k", "scaling_factors"),
        prepare=_mean_omega,
        **_AGAINST_E,
    ),
    "figure-3a": Plot(lines, _MSE, paper="3a"),
    "figure-3b": Plot(lines, _MSE_OTHER_DOMAIN, paper="3b"),
    # The paper's numbers are of the other domain, as in 3b.
    "figure-3c": Plot(lines, _LOSS_OTHER_DOMAIN, paper="3c"),
    "figure-3d": Plot(
        lines,
        Metric("autointerp_accuracy", "accuracy of the judge"),
        x="quantile",
        paper="3d",
        source="scores",
    ),
    "figure-4a": Plot(lines, _MSE, paper="4a", **_LINE_FOR_EACH_E),
    "figure-4b": Plot(lines, _MSE_OTHER_DOMAIN, **_LINE_FOR_EACH_E),
    "figure-4c": Plot(lines, _LOSS, paper="4c", **_LINE_FOR_EACH_E),
    "figure-4d": Plot(lines, _LOSS_OTHER_DOMAIN, **_LINE_FOR_EACH_E),
    "figure-5a": Plot(lines, _MSE, paper="5a", **_AGAINST_E),
    "figure-5b": Plot(
        lines,
        _MSE,
        line="feature_scaling",
        where={**_OF_64, "experts_per_token": 16},
        paper="5b",
        source="experts",
    ),
    "figure-6a": Plot(
        lines,
        Metric("cosine_similarity_of_latents", "cosine similarity of latents"),
        line="latents",
        x="experts_per_token",
        where={**_UNSCALED, "k": 32},
        source="experts",
        needs=(
            "experts_per_token",
            "intra_expert_similarity",
            "inter_expert_similarity",
        ),
        prepare=_both_similarities,
    ),
    "figure-6b": Plot(
        usage,
        Metric("expert_counts", "cumulative share of selections"),
        line="experts_per_token",
        where={**_SCALED, "k": 32},
        source="experts",
        needs=("experts_per_token", "expert_counts"),
    ),
    "figure-7a": Plot(
        lines,
        Metric(
            "activation_similarity_reduction",
            "reduction of activation similarity",
            "percent",
        ),
        line="experts_per_token",
        where=_OF_64,
        paper="7a",
        source="experts",
        needs=("experts_per_token", "k", "feature_scaling", "activation_similarity"),
        prepare=_similarity_reduction,
    ),
    # Equation A.3.
    "figure-7b": Plot(
        lines,
        Metric("activation_similarity", "activation similarity"),
        paper="7b",
        **_LINE_FOR_EACH_E,
    ),
    "figure-8": Plot(lines, _REDUNDANCY, paper="redundancy"),
    "figure-8a": Plot(cells, _REDUNDANCY, paper="8a", **_LINE_FOR_EACH_E),
    "figure-8b": Plot(
        lines,
        _REDUNDANCY,
        line="feature_scaling",
        x="experts_per_token",
        # Few active latents make most repetitions.
        where={**_OF_64, "k": pd.Series.min},
        source="experts",
    ),
    # The paper's numbers are of 256/8.
    "figure-10": Plot(
        lines,
        _MSE,
        line="decomposition",
        where={**_OF_64, "experts_per_token": 2, "feature_scaling": True},
        paper="10",
        source="decompositions",
    ),
    "figure-11": Plot(
        overlaps,
        Metric("overlap_histogram", "share of pairs of tokens"),
        line="feature_scaling",
        where=_OF_64,
        source="experts",
        needs=("experts_per_token", "k", "feature_scaling", "overlap_histogram"),
    ),
    "loss-recovered": Plot(lines, _LOSS),
    "learning-curves": Plot(
        curves,
        Metric("fvu", "fraction of variance unexplained", "log"),
        x="tokens",
        where={"k": 32},
        source="curves",
        needs=("label", "tokens", "cpu_seconds", "fvu"),
        title="k = {k}; seconds are CPU time",
    ),
}
# No figure of the paper: for people who have read nothing yet.
QUALITY_AND_COST = Plot(
    costs,
    Metric("fvu", "fraction of variance unexplained", "log"),
    x="training_flops",
    where={"k": 32},
    prepare=_best_of_each,
    source="grid",
    title="SmolLM2-135M, layer 8, k = {k}",
)
_METRICS = {plot.metric.column: plot.metric for plot in FIGURES.values()}


def draw(
    figure: str | Plot,
    runs: pd.DataFrame,
    *,
    labels: list[str] | None = None,
    paper: bool = False,
    title: str | None = None,
    **where: Any,
) -> Figure:
    """
    Draw a figure; save it with ``savefig``.

    Args:
        figure: Name of an entry of :data:`FIGURES`, or an entry of one's own.
        runs: A row for each run; see :mod:`reproduction.figures`.
        labels: Draw these only, in this order; all by default.
        paper: Draw the paper's numbers beside, if its scripts hold them.
        title: Title of the figure; by default the entry's.
        where: Columns and their values, in place of the entry's: ``k=8``. None for any.

    Raises:
        ValueError: If there is no such entry, nothing to draw, a column or a label is
            missing, two runs have the same seed at the same point, a number is infinite
            or, on a logarithmic axis, not positive, or a list has the wrong length.
    """
    if isinstance(figure, str):
        if figure not in FIGURES:
            raise ValueError(f"figures are {', '.join(FIGURES)}, got {figure!r}")
        figure = FIGURES[figure]
    plot = replace(figure, where={**figure.where, **where})
    needs = plot.needs or (plot.line, plot.x, plot.metric.column)
    if "feature_scaling" in needs:
        # Runs with and without it are compared: one decomposition of it at a time.
        runs = with_mean_decomposition(runs)
    runs = select(runs, [*needs, "seed"], labels, plot.where)
    if plot.prepare is not None:
        runs = plot.prepare(runs)
    panels = [Panel(runs, plot.metric)]
    if paper and plot.paper is not None:
        numbers = paper_figure(plot.paper)
        name = ", ".join(filter(None, ("GPT-2 small", numbers.dataset)))
        panels = [
            Panel(runs, plot.metric, "measured"),
            Panel(numbers.results, _METRICS[numbers.metric], f"paper ({name})", "--"),
        ]
    if title is None and plot.title is not None:
        title = plot.title.format(**plot.where)
    return plot.kind(plot, panels, title)

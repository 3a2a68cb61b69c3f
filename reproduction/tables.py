"""
Tables of runs, rows of :func:`.records.read`: text for the command line, Markdown for documents.

In Markdown a single run, or seed, is marked with an asterisk.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sae_lens.registry import get_sae_training_class

from sae_lens_scale.recipes import Architecture, recipe_of

# Start of the labels of our SAEs.
OURS = "Scale"
# The column of the records that says how long a run was.
TOKENS = "settings.training_tokens"
# Parts of a training step; the last is their sum.
_FLOPS = ("router", "encoder", "decoder", "backward", "total")
# Headers of a table's columns, by the column of the frame that they are values of.
_HEADERS = {"k": "k = {:g}".format, TOKENS: "{:,.0f} tokens".format}
_SCORES: dict[str, tuple[str, Callable[[float], str]]] = {
    "fvu": ("FVU", "{:.3f}".format),
    "loss_recovered": ("loss recovered", "{:.3f}".format),
    "probing_auc_1": ("probing, 1 latent", "{:.3f}".format),
    "probing_auc_5": ("5 latents", "{:.3f}".format),
    "probing_auc_16": ("16 latents", "{:.3f}".format),
}
_L1_METRICS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("L0", "l0", "{:.1f}".format),
    ("FVU", "fvu", "{:.4f}".format),
    ("loss recovered", "loss_recovered", "{:.4f}".format),
)

# Architecture, k and training tokens of the runs whose recipes are listed.
_RECIPE_RUNS: tuple[tuple[Architecture, int, int], ...] = (
    ("scale", 8, 1_000_000),
    ("scale", 32, 1_000_000),
    ("scale", 64, 1_000_000),
    ("switch", 32, 1_000_000),
    ("scale", 32, 200_000),
    ("scale", 32, 40_000_000),
)
# Fields of the SAE's config that are listed, by the recipe or by default.
_RECIPE_FIELDS = (
    "num_experts",
    "experts_per_token",
    "num_shared_experts",
    "gate",
    "aux_loss_coefficient",
    "multi_topk_coefficient",
    "router_lr_factor",
    "load_balance_coefficient",
    "normalize_activations",
)


def summary(
    runs: pd.DataFrame, metrics: Sequence[str] = ("fvu", "l0", "alive", "dead")
) -> str:
    """
    Means and spreads of metrics over seeds, as text: a line for each label, k and combination of
    those settings (but the seed) that differ between runs of one label and k.
    """
    groups = runs.groupby(["label", "k", *_varying(runs)], dropna=False)
    text = groups[[*metrics]].agg(_mean_and_spread)
    return text.assign(runs=groups.size()).reset_index().to_string(index=False)


def _varying(runs: pd.DataFrame) -> list[str]:
    settings = [
        name
        for name in runs
        if str(name).startswith(("settings.", "sae_cfg."))
        # sae_cfg has these and the defaults; a Gated SAE's L0 stands for its coefficient.
        and not str(name).startswith("settings.sae.")
        and name not in ("settings.seed", "sae_cfg.l1_coefficient")
    ]
    groups = runs[settings].groupby([runs["label"], runs["k"]])
    most = groups.nunique(dropna=False).to_numpy().max(axis=0, initial=0)
    return [name for name, n in zip(settings, most, strict=True) if n > 1]


def _mean_and_spread(values: pd.Series) -> str:
    spread = f" ± {values.std():.4f}" if len(values) > 1 else ""
    return f"{values.mean():.4f}{spread}"


def cells(
    runs: pd.DataFrame, metric: str, rows: str = "label", columns: str = "k"
) -> pd.DataFrame:
    """
    Average a metric over seeds.

    Args:
        rows: Column whose values name the rows.
        columns: Column whose values are the columns, ``k`` or ``settings.training_tokens``
            for :func:`markdown`.

    Returns:
        A frame of tuples ``(mean, standard deviation or NaN, runs)``, and of NaN where there
        is no run; rows in the order of ``runs``.
    """
    measured = runs.dropna(subset=[metric])
    groups = measured.groupby([rows, columns], sort=False)[metric]
    summary = groups.agg(["mean", "std", "size"])
    values = pd.Series(
        list(summary.itertuples(index=False, name=None)), index=summary.index
    )
    # The order after unstack depends on the values that the first rows lack.
    order = list(dict.fromkeys(measured[rows]))
    return values.unstack().reindex(index=order).sort_index(axis="columns")


def measured_runs(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Select the runs that have a metric, a column that may be missing."""
    return runs.dropna(subset=[metric]) if metric in runs else runs.head(0)


def _means(runs: pd.DataFrame, metric: str, columns: str = "k") -> pd.DataFrame:
    return cells(runs, metric, columns=columns).map(
        lambda cell: cell[0] if isinstance(cell, tuple) else float("nan")
    )


def _paired(
    runs: pd.DataFrame, metric: str, columns: str = "k"
) -> Callable[..., list[list[float]]]:
    """A function of a column's value and of labels: a row for each seed that all of them have."""
    by_seed = runs.pivot_table(metric, index="seed", columns=["label", columns])

    def of_seeds(value: float, *labels: str) -> list[list[float]]:
        wanted = pd.MultiIndex.from_product([labels, [value]])
        return by_seed.reindex(columns=wanted).dropna().to_numpy().tolist()

    return of_seeds


def markdown(frame: pd.DataFrame, form: Callable[[float], str]) -> str:
    """Write a frame of :func:`cells` as means and spreads in Markdown."""

    rows = [[str(row), *_written(frame.loc[row], form)] for row in frame.index]
    return _lines(["", *_headers(frame)], rows)


def _headers(frame: pd.DataFrame) -> list[str]:
    return [_HEADERS[str(frame.columns.name)](x) for x in frame.columns]


def _written(row: pd.Series, form: Callable[[float], str]) -> list[str]:
    def write(cell: tuple[float, float, int] | float) -> str:
        if not isinstance(cell, tuple):
            return "-"
        mean, std, size = cell
        return f"{form(mean)}*" if size == 1 else f"{form(mean)} ± {form(std)}"

    return [write(cell) for cell in row]


def scores_table(
    runs: pd.DataFrame, scores: Mapping[str, tuple[str, Callable[[float], str]]]
) -> str:
    """
    Write means and spreads of several scores in Markdown, a column each.

    Args:
        runs: Runs, with a column ``row`` that names their rows.
        scores: Columns of ``runs``, each with its header and a function that writes a value.
    """
    columns = [
        _written(cells(runs.assign(of=""), score, "row", "of").iloc[:, 0], form)
        for score, (_, form) in scores.items()
    ]
    names = dict.fromkeys(runs["row"])
    rows = [[*row] for row in zip(names, *columns, strict=True)]
    return _lines(["", *(header for header, _ in scores.values())], rows)


def recipe_table(d_sae: int) -> str:
    """List what the recommended recipe chooses for d_sae latents, in Markdown."""
    columns: dict[str, dict[str, Any]] = {}
    for architecture, k, tokens in _RECIPE_RUNS:
        recipe = recipe_of(
            "recommended", architecture, d_sae=d_sae, k=k, training_tokens=tokens
        )
        config_class: Any = get_sae_training_class(architecture)[1]
        cfg = config_class(d_in=1, d_sae=d_sae, k=k, **recipe.sae)
        settings = recipe.runner | {n: getattr(cfg, n) for n in _RECIPE_FIELDS}
        name = f"{architecture.capitalize()}, k = {k}"
        columns[f"{name}, {tokens:,} tokens"] = settings
    names = next(iter(columns.values()))
    rows = [
        [f"`{name}`", *(_setting(settings[name]) for settings in columns.values())]
        for name in names
    ]
    return _lines(["", *columns], rows)


def _setting(value: Any) -> str:
    return f"`{value}`" if isinstance(value, (str, bool)) else f"{value:,}"


def l1_table(runs: pd.DataFrame) -> str:
    """
    Table of Gated SAEs of one size, which have no k, a column for each L1 coefficient: L0, FVU and,
    where it was measured, loss recovered.
    """
    coefficients = sorted(set(runs["sae_cfg.l1_coefficient"]))
    rows = []
    for name, metric, form in _L1_METRICS:
        if len(measured_runs(runs, metric)):
            found = cells(runs, metric, "label", "sae_cfg.l1_coefficient")
            row = found.reindex(columns=coefficients).iloc[0]
            rows.append([name, *_written(row, form)])
    header = [runs["label"].iloc[0], *(f"L1 = {x:g}" for x in coefficients)]
    return _lines(header, rows)


def gated_comparison(gated: pd.DataFrame, others: pd.DataFrame) -> str:
    """
    Compare the errors of SAEs with a k to those of Gated SAEs of one size at equal L0: the others'
    mean FVU between two of their k is interpolated, log FVU over log k.

    Returns:
        A table in Markdown, of shares by which errors are lower, with a column for each L1
        coefficient whose L0 lies between the smallest and the largest k, or "" if there is none.
        A label has a dash where its own k do not reach, and is left out if they never do.
    """
    means = gated.groupby("sae_cfg.l1_coefficient")[["l0", "fvu"]].mean()
    l0, error = np.asarray(means, dtype=float).T
    reached = (l0 >= others["k"].min()) & (l0 <= others["k"].max())
    if not reached.any():
        return ""
    l0, error = l0[reached], error[reached]
    rows = []
    for label, fvu in _means(others, "fvu").iterrows():
        fvu = fvu.dropna()
        k, known = np.asarray([*fvu.items()], dtype=float).T
        interpolated = np.exp(
            np.interp(np.log(l0), np.log(k), np.log(known), left=np.nan, right=np.nan)
        )
        lower = 1 - interpolated / error
        if not np.isnan(lower).all():
            rows.append([str(label), *("-" if x != x else f"{x:.1%}" for x in lower)])
    return _lines(["lower than Gated", *(f"L0 = {x:.1f}" for x in l0)], rows)


def groups_table(scores: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """
    Table in Markdown of what ``sae-lens-scale score --group`` found.

    Args:
        scores: Its JSON.
        names: Rows, by the start of the names of the SAEs' folders, in order; others are left
            out.

    Returns:
        A row for each group that is named, a column for each score.
    """
    rows = []
    for start, name in names.items():
        for group in scores["groups"]:
            if Path(group["saes"][0]).name.startswith(start):
                cells = [
                    _score(group["scores"][score], form)
                    for score, (_, form) in _SCORES.items()
                ]
                rows.append([name, f"{len(group['saes'])}", *cells])
    return _lines(["", "seeds", *(header for header, _ in _SCORES.values())], rows)


def _score(score: Mapping[str, float | None], form: Callable[[float], str]) -> str:
    mean, std = score["mean"], score["std"]
    if mean is None:
        return "-"
    return f"{form(mean)}*" if std is None else f"{form(mean)} ± {form(std)}"


def flops_table(runs: pd.DataFrame) -> str:
    """
    Table in Markdown of the cost of training, in millions of FLOPs per token, of runs that have a k,
    at the smallest of the k that most labels have; labels that have no such run are left out.
    """
    # Seeds do not differ.
    runs = runs.drop_duplicates(["label", "k"])
    k = min(runs["k"].mode())
    rows = [
        [
            run["label"],
            *(
                f"{run[f'measures.flops_per_token.training.{name}'] / 1e6:.2f}"
                for name in _FLOPS
            ),
        ]
        for _, run in runs.loc[runs["k"] == k].iterrows()
    ]
    return _lines([f"k = {k:g}", *_FLOPS], rows)


def comparison(
    runs: pd.DataFrame, metric: str = "fvu", columns: str = "k", kind: str = OURS
) -> str:
    """
    Compare the error of the best SAE of a kind, a start of labels, to those of others.

    Args:
        metric: The error.
        columns: Column at whose values to compare: ``k`` or ``settings.training_tokens``.

    Returns:
        A table in Markdown: for each value the best one's label, and by how much its mean error is
        lower than the mean errors of the other labels, each over the seeds that both have, and
        in parentheses seed by seed.

    Raises:
        ValueError: If no run is of that kind.
    """
    means = _means(runs, metric, columns)
    best = _best_of(means, kind)
    rows = [[f"best {kind} SAE", *best]]

    def lower(error: float, other: float) -> float:
        return 1 - error / other

    paired = _paired(runs, metric, columns)
    for label in means.index:
        row = [
            "-" if label == name else _percent(lower, paired(value, name, label), 1)
            for value, name in best.items()
        ]
        if set(row) != {"-"}:
            rows.append([f"lower than {label}", *row])
    return _lines(["", *_headers(means.reindex(columns=best.index))], rows)


def gap_closed(
    runs: pd.DataFrame, floor: str, ceiling: str, metric: str = "fvu"
) -> str:
    """
    Measure the share of the gap between two SAEs that others close, at each k.

    Args:
        floor: Label of the SAE of the same cost.
        ceiling: Start of the labels of SAEs of the same width; at each k the best counts.
        metric: The error.

    Returns:
        A table in Markdown: for each k the best SAE of the same width, and for the other labels the
        share of the seeds that all three have, and in parentheses seed by seed; 100 % is as good as
        the ceiling.

    Raises:
        ValueError: If a label is missing.
    """
    means = _means(runs, metric)
    if floor not in means.index:
        raise ValueError(f"runs must have {floor!r}, got {[*means.index]}")
    means = means.dropna(axis="columns", subset=[floor])
    best = _best_of(means, ceiling)
    means = means.reindex(columns=best.index).dropna(axis="index", how="all")
    paired = _paired(runs, metric)

    def closed(high: float, low: float, error: float) -> float:
        return (high - error) / (high - low)

    rows = [["of the gap to", *best]]
    for label in means.index.difference([floor], sort=False):
        row = [
            "-"
            if label == name
            else _percent(closed, paired(value, floor, name, label), 0)
            for value, name in best.items()
        ]
        if set(row) != {"-"}:
            rows.append([label, *row])
    return _lines(["", *_headers(means)], rows)


def best_cells(
    runs: pd.DataFrame, kinds: Mapping[str, str], metric: str = "fvu"
) -> pd.DataFrame:
    """
    Average the error of the best SAE of each kind, at each k, over seeds.

    Args:
        kinds: Names of the rows, by starts of labels.
        metric: The error.

    Returns:
        A frame as of :func:`cells`, of the kinds that there are.
    """
    labelled = cells(runs, metric)
    means = _means(runs, metric)
    rows = {
        row: {k: labelled.loc[label, k] for k, label in _best_of(means, kind).items()}
        for kind, row in kinds.items()
        if any(label.startswith(kind) for label in means.index)
    }
    return pd.DataFrame.from_dict(rows, orient="index").reindex(
        columns=labelled.columns
    )


def _best_of(means: pd.DataFrame, kind: str) -> pd.Series:
    """Find the label of a kind with the lowest mean, for each column that any of them has."""
    labels = [label for label in means.index if label.startswith(kind)]
    if not labels:
        raise ValueError(f"runs must have a {kind} SAE, got {[*means.index]}")
    return means.loc[labels].dropna(axis="columns", how="all").idxmin()


def _percent(
    share: Callable[..., float], seeds: Sequence[Sequence[float]], digits: int
) -> str:
    """A share of the means over seeds, and of each seed's values."""
    if not seeds:
        return "-"
    mean = f"{share(*np.mean(seeds, axis=0)):.{digits}%}"
    if len(seeds) == 1:
        return f"{mean}*"
    return f"{mean} ({', '.join(f'{100 * share(*s):.{digits}f}' for s in seeds)})"


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in table)

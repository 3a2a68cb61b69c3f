"""What the records of an experiment say: tables in Markdown, and the paper's figures."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .presets import PRESETS
from .records import read, read_curves

# What labels of SAEs start with: ours, and those between which the comparison puts it.
_OURS, _SAME_COST, _SAME_WIDTH = "Scale", "TopK", "Full"
_FVU = "{:.4f}".format
_SHARE = "{:.2%}".format
# What a training step is made of; the last is their sum.
_FLOPS = ("router", "encoder", "decoder", "backward", "total")
# Tables of the main grid: name, column of the records, how to write its numbers.
_METRICS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("fvu", "fvu", _FVU),
    ("fvu-other-domain", "fvu_other_domain", _FVU),
    ("loss-recovered", "loss_recovered", _FVU),
    ("loss-recovered-other-domain", "loss_recovered_other_domain", _FVU),
    ("alive", "alive", _SHARE),
    ("redundancy", "redundancy", _SHARE),
    ("redundancy-between-experts", "redundancy_between_experts", _SHARE),
    ("activation-similarity", "activation_similarity", _FVU),
    # Runs may have shared the machine with others, which wall time would show.
    ("cpu-seconds", "seconds.training_cpu", "{:.0f}".format),
)
_L1_METRICS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("L0", "l0", "{:.1f}".format),
    ("FVU", "fvu", _FVU),
    ("loss recovered", "loss_recovered", _FVU),
)


def _with_scaling(run: Any) -> str:
    return f"{'with' if run['feature_scaling'] else 'without'} scaling"


# Tables of the other grids: name, column, how to write its numbers, names of the rows.
_ABLATIONS: tuple[
    tuple[str, str, Callable[[float], str], Callable[[Any], str]], ...
] = (
    (
        "experts",
        "fvu",
        _FVU,
        lambda run: f"{run['label']}, {_with_scaling(run)}",
    ),
    (
        "scaling",
        "fvu",
        _FVU,
        lambda run: f"{run['label']}, {run['gate']}, {_with_scaling(run)}",
    ),
    (
        "decompositions",
        "fvu",
        _FVU,
        lambda run: f"{run['label']}, {run['decomposition']}",
    ),
    ("gates", "fvu", _FVU, lambda run: f"{run['label']}, {run['gate']}"),
    ("flops", "fvu", _FVU, lambda run: run["label"]),
    ("time", "fvu", _FVU, lambda run: run["label"]),
    ("recipe", "fvu", _FVU, lambda run: run["label"]),
    ("redundancy", "redundancy", _SHARE, lambda run: run["label"]),
)


def cells(
    runs: pd.DataFrame, metric: str, rows: str = "label", columns: str = "k"
) -> pd.DataFrame:
    """
    A metric averaged over seeds.

    Args:
        runs: What :func:`.records.read` returned, or some of its rows.
        metric: The column to average.
        rows: Column whose values name the rows.
        columns: Column whose values name the columns.

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
    # unstack sorts, which is right for k only.
    return values.unstack().reindex(index=list(dict.fromkeys(measured[rows])))


def _measured(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The runs that have a metric."""
    return runs.dropna(subset=[metric]) if metric in runs else runs.head(0)


def _means(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    return cells(runs, metric).map(
        lambda cell: cell[0] if isinstance(cell, tuple) else float("nan")
    )


def markdown(frame: pd.DataFrame, form: Callable[[float], str], corner: str) -> str:
    """
    A table of means and spreads in Markdown.

    Args:
        frame: What :func:`cells` returned.
        form: How to write a number.
        corner: What the first column is called.

    Returns:
        Lines of a table; a single run is marked with an asterisk.
    """

    rows = [[str(row), *_written(frame.loc[row], form)] for row in frame.index]
    return _lines([corner, *(f"k = {k:g}" for k in frame.columns)], rows)


def _written(row: pd.Series, form: Callable[[float], str]) -> list[str]:
    def write(cell: tuple[float, float, int] | float) -> str:
        if not isinstance(cell, tuple):
            return "-"
        mean, std, size = cell
        return f"{form(mean)}*" if size == 1 else f"{form(mean)} ± {form(std)}"

    return [write(cell) for cell in row]


def l1_table(runs: pd.DataFrame) -> str:
    """
    What SAEs that have no k make of each L1 coefficient.

    Args:
        runs: What :func:`.records.read` returned, or those of its rows that are of Gated
            SAEs of one size.

    Returns:
        A table in Markdown: L0, FVU and, where it was measured, loss recovered; a single
        run is marked with an asterisk.
    """
    coefficients = sorted(set(runs["sae_cfg.l1_coefficient"]))
    rows = []
    for name, metric, form in _L1_METRICS:
        if len(_measured(runs, metric)):
            found = cells(runs, metric, "label", "sae_cfg.l1_coefficient")
            row = found.reindex(columns=coefficients).iloc[0]
            rows.append([name, *_written(row, form)])
    header = [runs["label"].iloc[0], *(f"L1 = {x:g}" for x in coefficients)]
    return _lines(header, rows)


def flops_table(runs: pd.DataFrame) -> str:
    """
    What training costs per token.

    Args:
        runs: What :func:`.records.read` returned, or those of its rows that have a k.

    Returns:
        A table in Markdown, in millions of FLOPs, at the smallest of the k that most labels
        have; labels that have no such run are left out.
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


def comparison(runs: pd.DataFrame, metric: str = "fvu") -> str:
    """
    How much lower the error of the best Scale SAE is than that of others, at each k.

    Args:
        runs: What :func:`.records.read` returned, or some of its rows.
        metric: The error.

    Returns:
        A table in Markdown: for each k the best N/e, and by how much its mean error is
        lower than the mean errors of the other labels.

    Raises:
        ValueError: If no run is of a Scale SAE.
    """
    means = _means(runs, metric)
    ours = [label for label in means.index if label.startswith(_OURS)]
    if not ours:
        raise ValueError(f"runs must have a {_OURS} SAE, got {[*means.index]}")
    means = means.dropna(axis="columns", how="all", subset=ours)
    best = means.loc[ours].min()
    rows = [["best Scale SAE", *means.loc[ours].idxmin()]]
    for label in means.index.difference(ours, sort=False):
        lower = 1 - best / means.loc[label]
        rows.append(
            [f"lower than {label}", *("-" if x != x else f"{x:.1%}" for x in lower)]
        )
    return _lines(["", *(f"k = {k:g}" for k in means.columns)], rows)


def gap_closed(
    runs: pd.DataFrame, floor: str, ceiling: str, metric: str = "fvu"
) -> str:
    """
    How much of the gap between two SAEs others close, at each k.

    Args:
        runs: What :func:`.records.read` returned, or some of its rows.
        floor: Label of the SAE of the same cost.
        ceiling: Label of the SAE of the same width.
        metric: The error.

    Returns:
        A table in Markdown; 100 % is as good as the ceiling.

    Raises:
        ValueError: If a label is missing.
    """
    means = _means(runs, metric)
    for label in (floor, ceiling):
        if label not in means.index:
            raise ValueError(f"runs must have {label!r}, got {[*means.index]}")
    means = means.dropna(axis="columns", subset=[floor, ceiling])
    gap = means.loc[floor] - means.loc[ceiling]
    rows = [
        [label, *(f"{x:.0%}" for x in (means.loc[floor] - means.loc[label]) / gap)]
        for label in means.index.difference([floor, ceiling], sort=False)
    ]
    return _lines(["", *(f"k = {k:g}" for k in means.columns)], rows)


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    table = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def preset_runs(folder: str | Path, preset: str) -> pd.DataFrame:
    """
    The records of a preset's runs.

    Args:
        folder: Folder of the records.
        preset: Name of a preset.

    Returns:
        A row for each run that has a record, of any seed, label by label in the preset's
        order.

    Raises:
        ValueError: If there is no record at all.
    """
    runs = read(folder)
    if runs.empty:
        raise ValueError(f"{folder} has no records")
    seeds = sorted(set(runs["seed"]))
    planned = PRESETS[preset].with_seeds(seeds)
    labels = list(dict.fromkeys(run.label for run in planned))
    names = [r.name for r in sorted(planned, key=lambda r: labels.index(r.label))]
    found = runs.set_index("name", drop=False)
    return found.loc[[name for name in names if name in found.index]]


def tables(folder: str | Path, base: str) -> dict[str, str]:
    """
    All tables that the records of an experiment allow.

    Args:
        folder: Folder of the records.
        base: The presets' base, such as "smollm2".

    Returns:
        Tables in Markdown, by name; those that no record has a number for are left out.
    """
    found: dict[str, str] = {}
    runs = preset_runs(folder, base)
    main = set(runs["name"])
    if len(runs):
        # A Gated SAE has no k: its runs have no place in the other tables' columns.
        without_k = runs.loc[runs["sae_cfg.k"].isna()]
        if len(without_k):
            found["gated"] = l1_table(without_k)
        runs = runs.loc[runs["sae_cfg.k"].notna()]
        found["comparison"] = comparison(runs)
        counted = _measured(runs, "measures.flops_per_token.training.total")
        if len(counted):
            found["flops"] = flops_table(counted)
        ends = [_first(runs, start) for start in (_SAME_COST, _SAME_WIDTH)]
        if all(ends):
            found["gap"] = gap_closed(runs, *ends)
    for name, metric, form in _METRICS:
        measured = _measured(runs, metric)
        if len(measured):
            found[name] = markdown(cells(measured, metric), form, "")
    for ablation, metric, form, row_name in _ABLATIONS:
        runs = preset_runs(folder, f"{base}-{ablation}")
        runs = runs.assign(row=runs.apply(row_name, axis="columns"))
        # What it has in common with other grids is no ablation yet.
        if len(set(runs["row"])) > 1 and not set(runs["name"]) <= main:
            table = markdown(cells(runs, metric, "row"), form, "")
            found[f"ablation-{ablation}"] = table
    return found


def _first(runs: pd.DataFrame, start: str) -> str:
    return next((x for x in runs["label"] if x.startswith(start)), "")


def draw(
    folder: str | Path,
    base: str,
    images: str | Path,
    names: Sequence[str] | None = None,
) -> list[Path]:
    """
    Draw the paper's figures, and learning curves, from the records of an experiment.

    Args:
        folder: Folder of the records.
        base: The presets' base, such as "smollm2".
        images: Folder of the pictures, made if it is missing.
        names: Which figures to draw, such as "figure-3a"; all by default.

    Returns:
        Paths of the pictures.

    Raises:
        ValueError: If a name is unknown, or the records do not suffice for a figure.
    """
    # Here and not above: matplotlib comes with an extra that only pictures need.
    from sae_lens_scale.analysis import plots

    main = preset_runs(folder, base)
    # One point makes no line.
    lines = main.loc[~main["label"].str.startswith(_SAME_WIDTH)]
    experts = preset_runs(folder, f"{base}-experts")
    decompositions = preset_runs(folder, f"{base}-decompositions")
    curves = read_curves(folder)
    # In the order of the other figures, which decides about colours.
    order = main["name"].loc[main["name"].isin(curves["name"])]
    curves = curves.set_index("name", drop=False).loc[order]
    curves = curves.assign(seconds=curves["cpu_seconds"])
    paper: dict[str, Any] = {"paper": True}
    figures: dict[str, tuple[Callable[..., Any], pd.DataFrame, dict[str, Any]]] = {
        "figure-2": (plots.plot_scaling_factors, experts, paper),
        "figure-3a": (plots.plot_mse, lines, paper),
        "figure-3b": (plots.plot_mse_other_domain, lines, paper),
        "figure-3c": (plots.plot_loss_recovered, lines, paper),
        "figure-4a": (plots.plot_mse_by_experts, experts, paper),
        "figure-4c": (plots.plot_loss_recovered_by_experts, experts, paper),
        "figure-5a": (plots.plot_mse_with_scaling_by_experts, experts, paper),
        "figure-5b": (plots.plot_scaling_effect, experts, paper),
        "figure-6a": (plots.plot_expert_similarity, experts, {}),
        "figure-6b": (plots.plot_expert_usage, experts, {}),
        "figure-7a": (plots.plot_similarity_reduction, experts, paper),
        "figure-7b": (plots.plot_activation_similarity, experts, paper),
        "figure-8": (plots.plot_redundancy, lines, paper),
        "figure-8a": (plots.plot_redundancy_by_experts, experts, paper),
        "figure-8b": (
            plots.plot_redundancy_with_scaling,
            experts,
            # Few active latents make most repetitions.
            {"k": experts["k"].min()},
        ),
        "figure-10": (plots.plot_decompositions, decompositions, paper),
        "figure-11": (plots.plot_overlap_histogram, experts, {}),
        "learning-curves": (
            plots.plot_learning_curves,
            curves,
            {"k": 32, "title": "k = 32; seconds are CPU time"},
        ),
    }
    names = list(figures) if names is None else names
    unknown = sorted(set(names) - set(figures))
    if unknown:
        raise ValueError(f"figures are {', '.join(figures)}, got {unknown}")
    Path(images).mkdir(parents=True, exist_ok=True)
    drawn = []
    for name in names:
        plot, runs, options = figures[name]
        try:
            figure = plot(runs, **options)
        except ValueError as error:
            raise ValueError(f"{name} cannot be drawn: {error}") from error
        drawn.append(Path(images, f"{name}.png"))
        figure.savefig(drawn[-1], dpi=130)
    return drawn


def fill(document: str, tables: dict[str, str]) -> str:
    """
    Put tables where a document marks their places.

    Args:
        document: Text in Markdown, with pairs of lines ``<!-- table NAME -->`` and
            ``<!-- end -->``.
        tables: Tables by name.

    Returns:
        The text with new tables between these lines.

    Raises:
        ValueError: If the document names a table that there is not.
    """

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in tables:
            raise ValueError(
                f"tables are {', '.join(tables)}, the document names {name!r}"
            )
        return f"<!-- table {name} -->\n\n{tables[name]}\n\n<!-- end -->"

    marked = r"<!-- table (?P<name>[\w-]+) -->.*?<!-- end -->"
    return re.sub(marked, replace, document, flags=re.DOTALL)

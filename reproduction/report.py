"""What the records of an experiment say: tables in Markdown, and the paper's figures."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .presets import PRESETS
from .records import held_out_variances, read, read_curves, require_one_text
from .tables import (
    OURS,
    TOKENS,
    cells,
    comparison,
    flops_table,
    gap_closed,
    gated_comparison,
    l1_table,
    markdown,
    measured_runs,
)

# What labels of the SAEs start with between which the comparison puts the others.
_SAME_COST, _SAME_WIDTH = "TopK", "Full TopK"
_FVU = "{:.4f}".format
_SHARE = "{:.2%}".format
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
        ValueError: If there is no record at all, or if they are of different texts or of
            different numbers of contexts.
    """
    return _of_preset(_read_comparable(folder), preset)


def _read_comparable(folder: str | Path) -> pd.DataFrame:
    runs = read(folder)
    if runs.empty:
        raise ValueError(f"{folder} has no records")
    require_one_text(held_out_variances(runs), folder)
    evaluated = measured_runs(runs, "measures.loss_recovered.contexts")
    if len(evaluated):
        contexts = sorted(set(evaluated["measures.loss_recovered.contexts"]))
        if len(contexts) > 1:
            raise ValueError(
                f"the losses that {folder} compares must be of as many contexts, got "
                f"{' and '.join(f'{n:g}' for n in contexts)}: evaluate all with one number "
                "(experiment evaluate --contexts)"
            )
    return runs


def _of_preset(runs: pd.DataFrame, preset: str) -> pd.DataFrame:
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

    Raises:
        ValueError: As :func:`preset_runs` does.
    """
    found: dict[str, str] = {}
    everything = _read_comparable(folder)
    runs = _of_preset(everything, base)
    main = set(runs["name"])
    if len(runs):
        # A Gated SAE has no k: its runs have no place in the other tables' columns.
        without_k = runs.loc[runs["sae_cfg.k"].isna()]
        runs = runs.loc[runs["sae_cfg.k"].notna()]
        if len(without_k):
            found["gated"] = l1_table(without_k)
            if table := gated_comparison(without_k, runs):
                found["gated-comparison"] = table
        for name, metric in (
            ("comparison", "fvu"),
            ("comparison-other-domain", "fvu_other_domain"),
        ):
            measured = measured_runs(runs, metric)
            if _first(measured, OURS):
                found[name] = comparison(measured, metric)
        counted = measured_runs(runs, "measures.flops_per_token.training.total")
        if len(counted):
            found["flops"] = flops_table(counted)
        if _first(runs, _SAME_WIDTH):
            found["comparison-of-ceiling"] = comparison(runs, kind=_SAME_WIDTH)
            if same_cost := _first(runs, _SAME_COST):
                found["gap"] = gap_closed(runs, same_cost, _SAME_WIDTH)
    for name, metric, form in _METRICS:
        measured = measured_runs(runs, metric)
        if len(measured):
            found[name] = markdown(cells(measured, metric), form, "")
    for ablation, metric, form, row_name in _ABLATIONS:
        runs = _of_preset(everything, f"{base}-{ablation}")
        runs = runs.assign(row=[row_name(run) for _, run in runs.iterrows()])
        # What it has in common with other grids is no ablation yet.
        if len(set(runs["row"])) > 1 and not set(runs["name"]) <= main:
            table = markdown(cells(runs, metric, "row"), form, "")
            found[f"ablation-{ablation}"] = table
    runs = _of_preset(everything, f"{base}-length")
    if not set(runs["name"]) <= main:
        for name, metric, form in (
            ("length", "fvu", _FVU),
            ("length-redundancy", "redundancy", _SHARE),
        ):
            measured = measured_runs(runs, metric)
            if len(measured):
                found[name] = markdown(
                    cells(measured, metric, columns=TOKENS), form, ""
                )
        if _first(runs, OURS):
            found["length-comparison"] = comparison(runs, columns=TOKENS)
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
        names: Figures to draw, such as "figure-3a", of :data:`.figures.FIGURES`; by default
            all that the records suffice for.

    Returns:
        Paths of the pictures.

    Raises:
        ValueError: If a name is unknown, or the records do not suffice for a figure that was
            named, and as :func:`preset_runs` does.
    """
    # Here and not above: matplotlib comes with an extra that only pictures need.
    from reproduction import figures

    everything = _read_comparable(folder)
    main = _of_preset(everything, base)
    curves = read_curves(folder)
    # In the order of the other figures, which decides about colours.
    order = main["name"].loc[main["name"].isin(curves["name"])]
    sources = {
        # One point makes no line.
        "main": main.loc[~main["label"].str.startswith(_SAME_WIDTH)],
        "experts": _of_preset(everything, f"{base}-experts"),
        "decompositions": _of_preset(everything, f"{base}-decompositions"),
        "curves": curves.set_index("name", drop=False).loc[order],
    }
    known = {
        name: sources[plot.source]
        for name, plot in figures.FIGURES.items()
        if plot.source in sources
    }
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ValueError(f"figures are {', '.join(known)}, got {unknown}")
    Path(images).mkdir(parents=True, exist_ok=True)
    drawn = []
    for name in known if names is None else names:
        try:
            figure = figures.draw(name, known[name], paper=True)
        except ValueError as error:
            if names is None:
                continue
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

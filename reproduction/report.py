"""Tables and figures of a grid's runs, for documents."""

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sae_lens_scale.files import read_json

from .columns import COLUMNS
from .presets import PRESETS, VARIANTS_OF_DEFAULTS
from .records import held_out_variances, read, read_curves, require_one_text
from .tables import (
    OURS,
    TOKENS,
    best_cells,
    cells,
    comparison,
    flops_table,
    gap_closed,
    gated_comparison,
    groups_table,
    l1_table,
    markdown,
    measured_runs,
    recipe_table,
)

# Starts of the labels between which the comparison puts the others.
_SAME_COST, _SAME_WIDTH = "TopK", "Full TopK"


# Tables of the other grids: the metric, and the columns that a row is named by beside its label.
_ABLATIONS: dict[str, tuple[str, list[str]]] = {
    "experts": ("fvu", ["feature_scaling"]),
    "scaling": ("fvu", ["gate", "feature_scaling"]),
    "decompositions": ("fvu", ["decomposition"]),
    "gates": ("fvu", ["gate"]),
    "flops": ("fvu", []),
    "time": ("fvu", []),
    "recipe": ("fvu", []),
    "redundancy": ("redundancy", []),
}
# Kinds by the start of their labels, with names for people who know none of the labels.
BEST = {
    "Scale": "Scale SAE",
    "Switch": "Switch SAE",
    "TopK 576": "dense TopK, 576 latents",
    "Full TopK 18432": "dense TopK, 18,432 latents",
}
# Rows of the scores, by the start of the names of their runs.
_SCORED = {
    "scale-256-8-recommended-k": "Scale SAE",
    "switch-32-recommended-k": "Switch SAE",
    "topk-576-k": "dense TopK, 576 latents (same cost)",
    "full-topk-18432-k": "dense TopK, 18,432 latents (same width)",
    "scale-256-8-recommended-no-feature": "Scale SAE without feature scaling",
    "scale-256-8-recommended-no-shared": "Scale SAE without a shared expert",
    "scale-32-1-recommended-one-expert": "Scale SAE of one expert per token",
}
_WORDS = {True: "with scaling", False: "without scaling"}


def preset_runs(folder: str | Path, preset: str) -> pd.DataFrame:
    """
    Read the runs of a preset from a folder of records, or of the tables made of them: a row for each
    run that has a record, of any seed, label by label in the preset's order.

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
                f"losses in {folder} must be of equally many contexts, got "
                f"{' and '.join(f'{n:g}' for n in contexts)}: evaluate all with one number "
                "(evaluate --contexts)"
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
    Make all tables that the runs of a folder of records, or of tables made of them, allow.

    Args:
        base: The presets' base, such as "smollm2".

    Returns:
        Tables in Markdown, by name; those that no record has a number for are left out.

    Raises:
        ValueError: As :func:`preset_runs` does.
    """
    found = {"recipe": recipe_table(24_576)}
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
    forms = {column.name: column.form for column in COLUMNS if column.form}
    for metric, form in forms.items():
        measured = measured_runs(runs, metric)
        if len(measured):
            found[metric.replace("_", "-")] = markdown(cells(measured, metric), form)
    if len(runs) and len(best := best_cells(runs, BEST)):
        found["best"] = markdown(best, forms["fvu"])
    for ablation, (metric, columns) in _ABLATIONS.items():
        runs = _of_preset(everything, f"{base}-{ablation}")
        names = runs.reindex(columns=["label", *columns]).replace(_WORDS)
        runs = runs.assign(row=[", ".join(row) for row in names.to_numpy()])
        # Runs that it shares with the main grid are no ablation yet.
        if len(set(runs["row"])) > 1 and not set(runs["name"]) <= main:
            table = markdown(cells(runs, metric, "row"), forms[metric])
            found[f"ablation-{ablation}"] = table
    for name, preset, metric in (
        ("defaults", "defaults", "fvu"),
        ("defaults-other-domain", "defaults", "fvu_other_domain"),
        ("defaults-unseen-text", "defaults", "fvu_unseen_text"),
        ("short-defaults", "short-defaults", "fvu"),
    ):
        runs = _of_preset(everything, f"{base}-{preset}")
        if len(measured := measured_runs(runs, metric)):
            measured = measured.assign(row=_by_variant(measured))
            found[name] = markdown(cells(measured, metric, "row"), forms[metric])
    if (scores := Path(folder, "scores.json")).exists():
        found["scores"] = groups_table(read_json(scores), _SCORED)
    runs = _of_preset(everything, f"{base}-evidence")
    # Runs that it shares with other grids are not the parts yet.
    if len(set(runs["label"])) > len(BEST):
        found["parts"] = markdown(cells(runs, "fvu"), forms["fvu"])
    runs = _of_preset(everything, f"{base}-length")
    if not set(runs["name"]) <= main:
        for name, metric in (("length", "fvu"), ("length-redundancy", "redundancy")):
            measured = measured_runs(runs, metric)
            if len(measured):
                table = cells(measured, metric, columns=TOKENS)
                found[name] = markdown(table, forms[metric])
        if _first(runs, OURS):
            found["length-comparison"] = comparison(runs, columns=TOKENS)
    return found


def _by_variant(runs: pd.DataFrame) -> list[str]:
    """Names of rows: the variant of a run whose sizes differ from k to k, else the label."""
    columns = runs[["label", "settings.architecture", "settings.variant"]]
    return [
        f"{architecture.capitalize()}, {variant}"
        if variant in VARIANTS_OF_DEFAULTS
        else label
        for label, architecture, variant in columns.itertuples(index=False)
    ]


def _first(runs: pd.DataFrame, start: str) -> str:
    return next((x for x in runs["label"] if x.startswith(start)), "")


def draw(
    folder: str | Path,
    base: str,
    images: str | Path,
    names: Sequence[str] | None = None,
) -> list[Path]:
    """
    Draw the paper's figures, and learning curves, of the runs of a folder.

    Args:
        folder: Folder of the records, or of the tables made of them.
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
    from reproduction.figures.table import QUALITY_AND_COST

    everything = _read_comparable(folder)
    main = _of_preset(everything, base)
    curves = read_curves(folder)
    # In the order of the other figures, which decides about colours.
    order = main["name"].loc[main["name"].isin(curves["name"])]
    sources = {
        # One point makes no line.
        "grid": main,
        "main": main.loc[~main["label"].str.startswith(_SAME_WIDTH)],
        "experts": _of_preset(everything, f"{base}-experts"),
        "decompositions": _of_preset(everything, f"{base}-decompositions"),
        "curves": curves.set_index("name", drop=False).loc[order],
    }
    plots = {**figures.FIGURES, "quality-and-cost": QUALITY_AND_COST}
    known = {
        name: sources[plot.source]
        for name, plot in plots.items()
        if plot.source in sources
    }
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ValueError(f"figures are {', '.join(known)}, got {unknown}")
    Path(images).mkdir(parents=True, exist_ok=True)
    drawn = []
    for name in known if names is None else names:
        try:
            figure = figures.draw(plots[name], known[name], paper=True)
        except ValueError as error:
            if names is None:
                continue
            raise ValueError(f"{name} cannot be drawn: {error}") from error
        drawn.append(Path(images, f"{name}.png"))
        figure.savefig(drawn[-1], dpi=130)
    return drawn


def fill(document: str, tables: dict[str, str]) -> str:
    """
    Put tables into a document in Markdown, between the lines ``<!-- table NAME -->`` and
    ``<!-- end -->``.

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

"""Points of a figure's lines: from a frame of runs to means over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class Point:
    """
    A point of a line: the mean of runs that differ in their seed only, and the standard deviation
    of a sample, None for a single seed.
    """

    line: Any
    x: Any
    mean: float
    std: float | None
    seeds: int


def select(
    runs: pd.DataFrame,
    needs: Sequence[str],
    labels: Sequence[str] | None = None,
    where: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """
    Select the rows that a figure shows.

    Args:
        needs: Columns that a figure is drawn of; rows that lack one are left out.
        labels: Keep the rows of these, in this order; all if None.
        where: Columns, and the value that they must have: None for any, or a function of
            the column, such as ``pd.Series.min``.

    Raises:
        ValueError: If a column or a label is missing, or no row is left.
    """
    where = {name: value for name, value in (where or {}).items() if value is not None}
    require_columns(runs, [*needs, *where, *([] if labels is None else ["label"])])
    where = {n: v(runs[n]) if callable(v) else v for n, v in where.items()}
    if labels is not None:
        known = runs["label"].unique().tolist()
        unknown = [label for label in labels if label not in known]
        if unknown:
            raise ValueError(f"labels must be among {known}, got {unknown}")
        runs = pd.concat([runs.loc[runs["label"] == label] for label in labels])
    for name, value in where.items():
        runs = runs.loc[runs[name] == value]
    runs = runs.dropna(subset=[*needs])
    for label in labels or ():
        if label not in set(runs["label"]):
            raise ValueError(f"runs with label {label!r} lack {', '.join(needs)}")
    if runs.empty:
        conditions = "".join(f", {name}={value!r}" for name, value in where.items())
        raise ValueError(
            f"runs must have rows with {', '.join(needs)}{conditions}, got none"
        )
    return runs


def require_columns(runs: pd.DataFrame, names: Sequence[str]) -> None:
    """Refuse a frame that lacks columns, by their names."""
    missing = [name for name in dict.fromkeys(names) if name not in runs]
    if missing:
        raise ValueError(f"runs must have the columns {missing}, has {[*runs.columns]}")


def require_positive(values: Sequence[float], name: str) -> None:
    """Refuse numbers without a place on a logarithmic axis, or under a fraction."""
    if min(values) <= 0:
        raise ValueError(f"{name} must be positive, got {min(values)}")


def with_mean_decomposition(runs: pd.DataFrame) -> pd.DataFrame:
    """Leave out runs scaled by one of the other decompositions (appendix C)."""
    require_columns(runs, ["feature_scaling", "decomposition"])
    other = runs["feature_scaling"].eq(True) & runs["decomposition"].ne("mean")
    return runs.loc[~other]


def over_seeds(runs: pd.DataFrame, line: str, x: str, metric: str) -> list[Point]:
    """
    Average a metric over seeds, line by line in the order of ``runs``.

    Args:
        runs: A row for each run. Without a column "seed", each has a point of its own.
        line: Column that tells the lines apart.
        x: Column of the horizontal axis.

    Raises:
        ValueError: If a point has two runs with the same seed (averaged, runs with
            different settings would pass for seeds), or a number is infinite.
    """
    columns = runs.reindex(columns=[line, x, "seed"])
    values = runs[metric].astype(float)
    infinite = values.loc[values.abs() == math.inf]
    if len(infinite):
        raise ValueError(f"{metric} must be finite, got {infinite.iloc[0]}")
    again = columns.loc[columns.duplicated()]
    if len(again):
        of_line, at, seed = again.iloc[0].tolist()
        raise ValueError(
            f"runs must have one row for each {line}, {x} and seed, got several with "
            f"{of_line!r}, {at!r} and {seed!r}: leave out those with other settings"
        )
    found: Any = values.groupby([columns[line], columns[x]], sort=False)
    return [
        Point(
            of_line,
            at,
            seeds.mean(),
            seeds.std() if len(seeds) > 1 else None,
            len(seeds),
        )
        for (of_line, at), seeds in found
    ]

"""
The numbers behind the figures of the Scale SAE paper, to compare measurements with.

Xu et al., "Beyond Redundancy: Diverse and Specialized Multi-Expert Sparse Autoencoder", as
the authors' scripts plot them. ``paper.json`` says in which units, and what is left out.
They are of GPT-2 small: absolute errors do not compare with those of another model.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class PaperFigure:
    """
    Numbers of one figure.

    Attributes:
        metric: The column of ``results`` that it plots: "mse" (squared error summed over
            d_in = 768), "loss_recovered", "omega", "redundancy", ...
        results: One row for each point, in the columns of measured runs as far as the
            paper states them: "label", "num_experts", "experts_per_token",
            "feature_scaling", "decomposition", "k" (or "quantile") and the metric.
        dataset: Text that it was evaluated on; None if none was needed.
        note: A remark, such as a setting that the paper does not state.
    """

    metric: str
    results: pd.DataFrame
    dataset: str | None = None
    note: str | None = None


def paper_figure(figure: str) -> PaperFigure:
    """
    Numbers of one of the paper's figures: single values, as it reports no spread over seeds.

    Args:
        figure: "2", "3a", "3b", "3c", "3d", "4a", "4c", "5a", "5b", "7a", "7b", "8a" or
            "10"; or "redundancy", Switch SAE's beside Scale SAE's, which has no number.

    Raises:
        ValueError: If there are no numbers of such a figure.
    """
    figures = _read()["figures"]
    if figure not in figures:
        raise ValueError(f"figure must be one of {[*figures]}, got {figure!r}")
    record = dict(figures[figure])
    series = record.pop("series")
    lists = [name for name, value in series[0].items() if isinstance(value, list)]
    results = pd.DataFrame(series).explode(lists, ignore_index=True)
    return PaperFigure(results=results.infer_objects(), **record)


@cache
def _read() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("paper.json").read_text("utf-8"))

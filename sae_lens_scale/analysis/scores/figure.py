"""Figure of the scores of several SAEs."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sae_lens_scale.extras import require

from .spread import Spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4
# The better direction, by the beginning of a score's name.
_BETTER = {
    "fvu": "lower is better",
    "loss_recovered": "higher is better",
    "alive": "higher is better",
    "redundancy": "lower is better",
    "probing_auc": "higher is better",
}


def plot_scores(
    names: Sequence[str], scores: Sequence[Mapping[str, Spread]]
) -> "Figure":
    """
    Draw a panel for each score, with a row for each SAE or group of SAEs.

    Args:
        names: Name of each row.
        scores: Scores of each row, by the same names; bars are standard deviations.

    Returns:
        The figure; save it with ``savefig``.

    Raises:
        ImportError: If the package ``matplotlib`` is not installed.
        ValueError: If there is nothing to draw.
    """
    require("matplotlib", "score")
    from matplotlib.figure import Figure

    if not scores:
        raise ValueError("scores must not be empty")
    metrics = list(scores[0])
    columns = min(_COLUMNS, len(metrics))
    lines = -(-len(metrics) // columns)
    size = (3 * columns, lines * (1.1 + 0.3 * len(names)))
    # A figure of its own, not pyplot's: it leaves the caller's backend alone.
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for axes in panels[len(metrics) :]:
        axes.set_visible(False)
    for metric, axes in zip(metrics, panels, strict=False):
        for row, of_row in enumerate(scores):
            score = of_row[metric]
            if score.mean is not None:
                axes.errorbar(
                    score.mean, row, xerr=score.std, fmt="o", color=f"C{row}", capsize=3
                )
        better = next((b for n, b in _BETTER.items() if metric.startswith(n)), None)
        axes.set_title(metric if better is None else f"{metric}\n{better}", fontsize=9)
        # Text is shown as it is: a dollar sign does not begin a formula.
        axes.set_yticks(range(len(names)), names, parse_math=False, fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.15)
        axes.set_ylim(len(names) - 0.5, -0.5)
    return figure

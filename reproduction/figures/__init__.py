"""
The figures of the Scale SAE paper, drawn from measured records. Needs the extra ``plots``.

``draw("figure-3a", runs)`` draws an entry of the table :data:`FIGURES`; a new figure is a new
entry (and, if no kind of plot fits, a function in :mod:`.kinds`).

``runs`` is a DataFrame with a row for each trained SAE: "label" ("Scale 64/2"), "k" (for an
SAE without TopK the mean L0 of its seeds), "seed", "num_experts", "experts_per_token",
"feature_scaling", "decomposition", and the columns that a figure draws; cells that do not
apply are empty, and runs that lack a column of the figure are left out of it. For the learning
curves a row is a measurement during training, with "tokens" and "cpu_seconds"; for figure 3d
it is a "quantile" (a string) of a run. Lines are means over seeds, error bars sample standard
deviations. Runs that differ in anything else must not be in one frame: a figure refuses two
rows with the same seed at the same point.

With ``paper=True`` the paper's numbers have a panel beside the measured ones, dashed, since
they are of another model: shares have the same axis in both panels, squared errors do not.
"""

from .kinds import Metric, Plot
from .table import FIGURES, draw

__all__ = ["FIGURES", "Metric", "Plot", "draw"]

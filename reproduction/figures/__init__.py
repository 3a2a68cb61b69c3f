"""
The figures of the Scale SAE paper, drawn from measured records. Needs the extra ``plots``.

``runs`` is a DataFrame with a row for each trained SAE: "label" ("Scale 64/2"), "k" (for an
SAE without TopK the mean L0 of its seeds), "seed", "num_experts", "experts_per_token",
"feature_scaling", "decomposition", and the columns that a figure draws; cells that do not
apply are empty, and runs that lack what a figure draws are left out of it. Lines are means
over seeds, error bars sample standard deviations. Runs that differ in anything else must not
be in one frame: a figure refuses two rows with the same seed at the same point.

With ``paper=True`` the paper's numbers have a panel beside the measured ones, dashed, since
they are of another model: shares have the same axis in both panels, squared errors do not.
"""

from .experts import (
    plot_expert_similarity,
    plot_expert_usage,
    plot_scaling_factors,
)
from .reconstruction import (
    plot_autointerp,
    plot_decompositions,
    plot_learning_curves,
    plot_loss_recovered,
    plot_loss_recovered_by_experts,
    plot_mse,
    plot_mse_by_experts,
    plot_mse_other_domain,
    plot_mse_with_scaling_by_experts,
    plot_scaling_effect,
)
from .redundancy import (
    plot_activation_similarity,
    plot_overlap_histogram,
    plot_redundancy,
    plot_redundancy_by_experts,
    plot_redundancy_with_scaling,
    plot_similarity_reduction,
)

__all__ = [
    "plot_activation_similarity",
    "plot_autointerp",
    "plot_decompositions",
    "plot_expert_similarity",
    "plot_expert_usage",
    "plot_learning_curves",
    "plot_loss_recovered",
    "plot_loss_recovered_by_experts",
    "plot_mse",
    "plot_mse_by_experts",
    "plot_mse_other_domain",
    "plot_mse_with_scaling_by_experts",
    "plot_overlap_histogram",
    "plot_redundancy",
    "plot_redundancy_by_experts",
    "plot_redundancy_with_scaling",
    "plot_scaling_effect",
    "plot_scaling_factors",
    "plot_similarity_reduction",
]

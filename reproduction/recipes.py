"""
What each architecture is trained with: for each, the best that was found on held-out text at k = 32.

reproduction/LOG.md has what else was tried.
"""

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "scale": {
        "lr": 1.6e-3,
        "lr_factors": {"W_router": 0.1, "b_router": 0.1},
        "adam_beta2": 0.99,
        "dead_after_tokens": 20_000,
        "sae": {"topk_over": "gated_activations", "aux_loss_coefficient": 1 / 8},
    },
    "switch": {
        "lr": 1.6e-3,
        "lr_factors": {"W_router": 0.02, "b_router": 0.02},
        "adam_beta2": 0.99,
        "dead_after_tokens": 20_000,
        "sae": {"gate": "uniform", "aux_loss_coefficient": 1 / 8},
    },
    "topk": {"lr": 3.2e-3, "sae": {"aux_loss_coefficient": 1 / 32}},
    "gated": {"lr": 3.2e-3},
    "full": {
        "lr": 1.6e-3,
        "adam_beta2": 0.99,
        "dead_after_tokens": 20_000,
        "sae": {"aux_loss_coefficient": 1 / 32},
    },
}

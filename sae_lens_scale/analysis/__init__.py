"""
Measurements on trained SAEs and their tensors.

Plots are in :mod:`.plots` and automated interpretability in :mod:`.autointerp`, which need
extras of the package.
"""

from .contexts import top_activating_contexts
from .evaluation import loss_recovered
from .experts import (
    expert_coactivation,
    expert_similarity,
    expert_usage,
    scaling_factors,
)
from .page import explorer
from .redundancy import feature_redundancy, max_cosine_similarity
from .similarity import activation_similarity, overlap_histogram
from .tokens import explain_tokens

__all__ = [
    "activation_similarity",
    "expert_coactivation",
    "expert_similarity",
    "expert_usage",
    "explain_tokens",
    "explorer",
    "feature_redundancy",
    "loss_recovered",
    "max_cosine_similarity",
    "overlap_histogram",
    "scaling_factors",
    "top_activating_contexts",
]

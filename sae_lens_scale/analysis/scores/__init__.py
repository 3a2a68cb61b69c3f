"""The field's standard scores of SAEs: reconstruction, sparse probing, synthetic data."""

from .figure import plot_scores
from .probing import cache_activations, shortest_datasets, sparse_probing
from .reconstruction import reconstruction_scores
from .spread import Spread, spread
from .synthetic import synthetic_scores

__all__ = [
    "Spread",
    "cache_activations",
    "plot_scores",
    "reconstruction_scores",
    "shortest_datasets",
    "sparse_probing",
    "spread",
    "synthetic_scores",
]

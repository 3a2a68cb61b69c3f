"""Mixture SAEs: the base of Scale SAE and Switch SAE."""

from .config import MixtureSAEConfig, MixtureTrainingSAEConfig
from .inference import MixtureSAE
from .training import MixtureTrainingSAE

__all__ = [
    "MixtureSAE",
    "MixtureSAEConfig",
    "MixtureTrainingSAE",
    "MixtureTrainingSAEConfig",
]

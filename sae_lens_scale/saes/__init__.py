"""Scale SAE and Switch SAE, in SAELens's layout: one architecture per file."""

from .scale_sae import (
    ScaleSAE,
    ScaleSAEConfig,
    ScaleTrainingSAE,
    ScaleTrainingSAEConfig,
)
from .switch_sae import (
    SwitchSAE,
    SwitchSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
)

__all__ = [
    "ScaleSAE",
    "ScaleSAEConfig",
    "ScaleTrainingSAE",
    "ScaleTrainingSAEConfig",
    "SwitchSAE",
    "SwitchSAEConfig",
    "SwitchTrainingSAE",
    "SwitchTrainingSAEConfig",
]

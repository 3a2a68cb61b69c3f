"""
Scale SAE and Switch SAE for SAELens.

Importing this package makes the architectures ``"scale"`` and ``"switch"`` known to
SAELens, so that its runners train them, its loaders load them and its evaluation
evaluates them by name.
"""

from typing import Any

from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)

from .saes import (
    ScaleSAE,
    ScaleSAEConfig,
    ScaleTrainingSAE,
    ScaleTrainingSAEConfig,
    SwitchSAE,
    SwitchSAEConfig,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
)
from .saes.mixture.routing import Routing

__version__ = "0.1.0"

__all__ = [
    "Routing",
    "ScaleSAE",
    "ScaleSAEConfig",
    "ScaleTrainingSAE",
    "ScaleTrainingSAEConfig",
    "SwitchSAE",
    "SwitchSAEConfig",
    "SwitchTrainingSAE",
    "SwitchTrainingSAEConfig",
]


def _forget_earlier_import(
    registry: dict[str, Any], architecture: str, sae_class: type
) -> None:
    """Let a reloaded module take its own earlier place, but nobody else's."""
    registered = registry.get(architecture)
    if registered and registered[0].__module__ == sae_class.__module__:
        del registry[architecture]


def _register() -> None:
    # Inference first: building a training config looks its inference class up.
    for sae_class, config_class in (
        (ScaleSAE, ScaleSAEConfig),
        (SwitchSAE, SwitchSAEConfig),
    ):
        architecture = config_class.architecture()
        _forget_earlier_import(SAE_CLASS_REGISTRY, architecture, sae_class)
        register_sae_class(architecture, sae_class, config_class)
    for sae_class, config_class in (
        (ScaleTrainingSAE, ScaleTrainingSAEConfig),
        (SwitchTrainingSAE, SwitchTrainingSAEConfig),
    ):
        architecture = config_class.architecture()
        _forget_earlier_import(SAE_TRAINING_CLASS_REGISTRY, architecture, sae_class)
        register_sae_training_class(architecture, sae_class, config_class)


_register()

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

from ._version import __version__ as __version__
from .recipes import recommended_config
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
    "recommended_config",
]


# Classes and configs for inference, then for training.
_ARCHITECTURES = (
    (ScaleSAE, ScaleSAEConfig, ScaleTrainingSAE, ScaleTrainingSAEConfig),
    (SwitchSAE, SwitchSAEConfig, SwitchTrainingSAE, SwitchTrainingSAEConfig),
)


def _forget_earlier_import(
    registry: dict[str, Any], architecture: str, sae_class: type
) -> None:
    """Let a reloaded module take its own earlier place, but nobody else's."""
    registered = registry.get(architecture)
    if registered and registered[0].__module__ == sae_class.__module__:
        del registry[architecture]


def _register() -> None:
    for sae_class, cfg_class, training_class, training_cfg_class in _ARCHITECTURES:
        name = cfg_class.architecture()
        # Inference first: building a training config looks its inference class up.
        _forget_earlier_import(SAE_CLASS_REGISTRY, name, sae_class)
        register_sae_class(name, sae_class, cfg_class)
        _forget_earlier_import(SAE_TRAINING_CLASS_REGISTRY, name, training_class)
        register_sae_training_class(name, training_class, training_cfg_class)


_register()

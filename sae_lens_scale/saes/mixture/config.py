"""Configuration of mixture SAEs, for inference and training."""

import sys
import warnings
from abc import ABC
from collections.abc import Collection
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from sae_lens.saes.sae import SAEConfig, TrainingSAEConfig
from sae_lens.util import dtype_to_str, str_to_dtype
from typing_extensions import override

from .routing import GATES, GateName
from .selection import SELECTIONS, TopKOver


@dataclass
class MixtureSAEConfig(SAEConfig, ABC):
    """
    Fields that the configs of all mixture-of-experts SAEs share.

    Args:
        num_experts (int): Number of experts; divides d_sae.
        k (int): Number of latents kept per token, over all its experts together.
        gate (GateName): Multiplier of a selected expert's activations: an entry of
            :data:`.GATES`.
        topk_over (TopKOver): Selection of the latents that survive: an entry of
            :data:`.SELECTIONS`.
        rescale_acts_by_decoder_norm (bool): Whether to treat the decoder as if its
            rows had unit norm, by moving their norms into the activations.
    """

    num_experts: int = 32
    k: int = 32
    gate: GateName = "softmax"
    topk_over: TopKOver = "activations"
    rescale_acts_by_decoder_norm: bool = False

    @property
    def experts_per_token(self) -> int:
        """Number of experts that each token selects."""
        return 1

    @property
    def num_shared_experts(self) -> int:
        """Number of them, the first experts, that all tokens select."""
        return 0

    @property
    def expert_size(self) -> int:
        """Latents per expert."""
        return self.d_sae // self.num_experts

    @override
    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """
        Check the fields as they are now; they may be changed after the config is built.

        Raises:
            ValueError: If one has a value that it must not have; names both.
        """
        # These would train, and then fail when the config is written as JSON.
        for field in fields(self):
            setattr(self, field.name, _to_json_type(getattr(self, field.name)))
        super().__post_init__()
        str_to_dtype(self.dtype)
        for name in ("d_in", "d_sae", "num_experts"):
            require_positive_integer(name, getattr(self, name))
        if self.d_sae % self.num_experts:
            raise ValueError(
                f"d_sae must be divisible by num_experts, got d_sae={self.d_sae} "
                f"and num_experts={self.num_experts}: name another num_experts"
            )
        # First, as k may follow from them.
        self.require_experts()
        require_positive_integer("k", self.k)
        candidates = self.experts_per_token * self.expert_size
        if self.k > candidates:
            raise ValueError(
                f"k must be at most the {candidates} latents of a token's experts "
                f"(experts_per_token={self.experts_per_token} times d_sae / "
                f"num_experts={self.expert_size}), got {self.k}"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            # A string such as "False", from a JSON file, would count as true.
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{field.name} must be a bool, got {value!r}")
        require_choice("gate", self.gate, GATES)
        require_choice("topk_over", self.topk_over, SELECTIONS)
        # Of any other value SAELens would leave heads apart, without an error.
        require_choice(
            "reshape_activations", self.reshape_activations, ("none", "hook_z")
        )

    def require_experts(self) -> None:
        """
        Check the numbers of a token's experts, which a batch is routed by.

        Raises:
            ValueError: If one is impossible; names it and its value.
        """
        require_positive_integer("experts_per_token", self.experts_per_token)
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token must be at most num_experts={self.num_experts}, "
                f"got {self.experts_per_token}"
            )
        shared = self.num_shared_experts
        if not is_integer(shared) or not 0 <= shared < self.experts_per_token:
            raise ValueError(
                "num_shared_experts must be an integer from 0 to less than "
                f"experts_per_token={self.experts_per_token}, got {shared!r}"
            )


# As SAEConfig types them, which has no name for the type.
NormalizeActivations: TypeAlias = Literal[
    "none", "expected_average_only_in", "layer_norm", "covariance_whitening"
]


@dataclass
class MixtureTrainingSAEConfig(MixtureSAEConfig, TrainingSAEConfig, ABC):
    """
    Fields that the training configs of all mixture-of-experts SAEs share.

    Args:
        use_sparse_activations (bool): Whether a training step keeps feature
            activations as a sparse tensor.
        load_balance_coefficient (float): Weight alpha of the load-balancing loss.
        aux_loss_coefficient (float): Weight of the dead-latent loss.
        multi_topk_coefficient (float): Weight of the Multi-TopK loss.
        initialize_from_activations (bool): Whether a fresh SAE starts from its first
            training batches.
        router_lr_factor (float): Learning rate of the router, as a multiple of the rest's.
    """

    rescale_acts_by_decoder_norm: bool = True
    normalize_activations: NormalizeActivations = "expected_average_only_in"
    use_sparse_activations: bool = True
    load_balance_coefficient: float = 0.03
    # docs/defaults.md says what else was measured.
    aux_loss_coefficient: float = 1 / 8
    multi_topk_coefficient: float = 1 / 8
    initialize_from_activations: bool = True
    # A power of two: saved and loaded routers are equal bit for bit in every dtype.
    router_lr_factor: float = 1 / 8

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype in ("bfloat16", "float16") and self.router_lr_factor < 1:
            warnings.warn(
                f"the router's small steps are lost to rounding in {self.dtype}, with "
                f"router_lr_factor={self.router_lr_factor}: use float32 weights, with "
                "autocast if you like, or router_lr_factor=1",
                stacklevel=3,
            )

    @override
    def validate(self) -> None:
        super().validate()
        for name in (
            "load_balance_coefficient",
            "aux_loss_coefficient",
            "multi_topk_coefficient",
        ):
            value = getattr(self, name)
            if not _is_finite_number(value) or value < 0:
                raise ValueError(
                    f"{name} must be a finite number of at least 0, got {value!r}"
                )
        if not _is_finite_number(self.router_lr_factor) or self.router_lr_factor <= 0:
            raise ValueError(
                "router_lr_factor must be a finite number above 0, got "
                f"{self.router_lr_factor!r}"
            )
        norm = self.decoder_init_norm
        if norm is not None and (not _is_finite_number(norm) or norm <= 0):
            raise ValueError(
                f"decoder_init_norm must be a finite number above 0 or None, got {norm!r}"
            )
        if self.normalize_activations in ("layer_norm", "constant_norm_rescale"):
            for name in ("aux_loss_coefficient", "multi_topk_coefficient"):
                if value := getattr(self, name):
                    raise ValueError(
                        f"{name} must be 0 with normalize_activations="
                        f"{self.normalize_activations!r}, got {value}: what is decoded in "
                        "normalised space would meet errors in the original one"
                    )

    @override
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> Any:
        # An inference export lacks the fields that only training has, but its metadata
        # keeps them: training that goes on from it goes on as it was.
        metadata = config_dict.get("metadata") or {}
        if metadata.get("training_architecture") == cls.architecture():
            details = metadata.get("training_architecture_details") or {}
            # Files of 0.1.0 do not say so, but their routers were trained like all else.
            config_dict = {"router_lr_factor": 1.0, **details, **config_dict}
        return super().from_dict(config_dict)


def is_integer(value: Any) -> bool:
    """Tell integers, NumPy's among them, from all else; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def require_positive_integer(name: str, value: Any) -> None:
    """Raise ValueError, with the field's name, unless its value is a positive integer."""
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _is_finite_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # False for NaN and for huge integers.


def _to_json_type(value: Any) -> Any:
    """Numpy's scalars (of a sweep, say), dtypes and devices as JSON can hold them."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.dtype):
        return dtype_to_str(value)
    return str(value) if isinstance(value, torch.device) else value


def require_choice(name: str, value: Any, registry: Collection[Any]) -> Any:
    """Return ``value`` if it is an entry of a registry, else raise ValueError."""
    # A list, which cannot be hashed, names none.
    if value not in list(registry):
        raise ValueError(f"{name} must be one of {tuple(registry)}, got {value!r}")
    return value

"""Configuration that Scale SAE and Switch SAE share, for inference."""

from abc import ABC
from dataclasses import dataclass, fields
from typing import Any, get_args

import numpy as np
import torch
from sae_lens.saes.sae import SAEConfig
from sae_lens.util import dtype_to_str
from typing_extensions import override

from sae_lens_scale.ops import GateName, TopKOver


@dataclass
class MixtureSAEConfig(SAEConfig, ABC):
    """
    Fields that the configs of all mixture-of-experts SAEs share.

    Args:
        num_experts (int): Number of experts; divides d_sae.
        k (int): Number of latents kept per token, over all its experts together.
        gate (GateName): What multiplies a selected expert's activations.
        topk_over (TopKOver): Whether TopK ranks activations before or after the gate.
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
        """How many experts each token selects."""
        return 1

    @property
    def num_shared_experts(self) -> int:
        """How many of them, the first experts, all tokens select."""
        return 0

    @property
    def expert_size(self) -> int:
        """Latents per expert."""
        return self.d_sae // self.num_experts

    @override
    def __post_init__(self) -> None:
        # These would train, and then fail when the config is written as JSON.
        for field in fields(self):
            setattr(self, field.name, _to_json_type(getattr(self, field.name)))
        super().__post_init__()
        for name in ("d_in", "d_sae", "num_experts", "experts_per_token", "k"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.d_sae % self.num_experts:
            raise ValueError(
                f"d_sae must be divisible by num_experts, got d_sae={self.d_sae} "
                f"and num_experts={self.num_experts}"
            )
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token must be at most num_experts={self.num_experts}, "
                f"got {self.experts_per_token}"
            )
        shared = self.num_shared_experts
        if (
            not isinstance(shared, int)
            or isinstance(shared, bool)
            or not 0 <= shared < self.experts_per_token
        ):
            raise ValueError(
                "num_shared_experts must be an integer from 0 to less than "
                f"experts_per_token={self.experts_per_token}, got {shared!r}"
            )
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
        require_choice("gate", self.gate, GateName)
        require_choice("topk_over", self.topk_over, TopKOver)


def _to_json_type(value: Any) -> Any:
    """Numpy's scalars (of a sweep, say), dtypes and devices as JSON can hold them."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.dtype):
        return dtype_to_str(value)
    return str(value) if isinstance(value, torch.device) else value


def require_choice(name: str, value: Any, choices: Any) -> Any:
    """Return ``value`` if it is one of a Literal's, else raise ValueError."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}")
    return value

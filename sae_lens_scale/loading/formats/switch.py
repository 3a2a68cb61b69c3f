"""Switch SAE of Mudide et al. (https://github.com/amudide/switch_sae)."""

from typing import Any

import torch
from typing_extensions import override

from sae_lens_scale.saes import SwitchSAEConfig

from .checkpoint_format import CheckpointFormat


class SwitchFormat(CheckpointFormat):
    """
    Checkpoints of ``switch_sae``.

    Their variant with one more expert that is always on cannot be told from the others by
    its tensors alone.
    """

    name = "Switch SAE of Mudide et al."
    marks = frozenset({"router.weight"})
    axes = {
        "b_dec": "d",
        "b_router": "d",
        "router.weight": "Nd",
        "encoder.weight": "Md",
        "decoder": "Md",
    }
    experts_per_token = 1

    @override
    def config(
        self, fields: dict[str, Any], experts_per_token: int, heaviside: bool
    ) -> SwitchSAEConfig:
        return SwitchSAEConfig(**fields, gate="uniform" if heaviside else "softmax")

    @override
    def tensors(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        W_enc = state["encoder.weight"].T
        return {
            "W_enc": W_enc,
            "b_enc": W_enc.new_zeros(W_enc.shape[1]),
            "W_dec": state["decoder"],
            "b_dec": state["b_dec"],
            "W_router": state["router.weight"].T,
            "b_router": state["b_router"],
        }

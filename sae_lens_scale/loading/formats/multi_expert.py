"""
Multi-expert SAE of Xu et al. (https://github.com/shahinxu/Scale-Sparse-Autoencoder): their
mixture without feature scaling.
"""

from typing import Any

import torch
from typing_extensions import override

from sae_lens_scale.saes import ScaleSAEConfig

from .checkpoint_format import CheckpointFormat


class MultiExpertFormat(CheckpointFormat):
    """
    Checkpoints of a mixture whose experts are modules of their own.

    ``gate.bias``, a bias on the router's logits, becomes a part of the router's centre.
    """

    name = "multi-expert SAE of Xu et al."
    marks = frozenset({"gate.weight"})
    axes = {
        "b_dec": "d",
        "b_gate": "d",
        "gate.bias": "N",
        "gate.weight": "Nd",
        "expert_modules.{i}.encoder.weight": "nd",
        "expert_modules.{i}.encoder.bias": "n",
        "expert_modules.{i}.decoder": "nd",
    }

    @override
    def config(
        self, fields: dict[str, Any], experts_per_token: int, heaviside: bool
    ) -> ScaleSAEConfig:
        return ScaleSAEConfig(
            **fields,
            experts_per_token=experts_per_token,
            gate="uniform" if heaviside else "double_softmax",
        )

    @override
    def tensors(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        def joined(name: str) -> torch.Tensor:
            experts = range(len(state["gate.bias"]))
            return torch.cat([state[f"expert_modules.{i}.{name}"] for i in experts])

        W_router = state["gate.weight"].T
        shift = _input_shift(W_router.double(), state["gate.bias"].double())
        return {
            "W_enc": joined("encoder.weight").T,
            "b_enc": joined("encoder.bias"),
            "W_dec": joined("decoder"),
            "b_dec": state["b_dec"],
            "W_router": W_router,
            "b_router": state["b_gate"].double() - shift,
        }


def _input_shift(W_router: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """
    Find the smallest shift of a router's input that changes its logits as a bias does.

    Args:
        W_router: Router weights, ``[d_in, num_experts]``, float64.
        bias: Bias on the logits, ``[num_experts]``, float64.

    Returns:
        ``[d_in]``. Its product with ``W_router`` is ``bias`` up to a constant, which
        softmax does not see.

    Raises:
        ValueError: If there is no such shift, or only one so large that the router
            would compute something else in float32.
    """
    centred = W_router - W_router.mean(dim=1, keepdim=True)
    wanted = bias - bias.mean()
    solution = torch.linalg.lstsq(centred.T, wanted.unsqueeze(1), driver="gelsd")
    shift = solution.solution.squeeze(1)
    missed = (shift @ centred - wanted).abs().max() / wanted.abs().max().clamp(min=1)
    # Bounds the change of a logit by rounding of the shifted input.
    rounding = (shift.abs() @ W_router.abs()).max() * torch.finfo(torch.float32).eps
    if missed > 1e-9 or rounding > 1e-5:
        raise ValueError(
            "gate.bias cannot be expressed by the router's centre: as a shift of the "
            f"router's input it misses logits by {missed:.1e} (relative) and float32 "
            f"would round them by up to {rounding:.1e}"
        )
    return shift

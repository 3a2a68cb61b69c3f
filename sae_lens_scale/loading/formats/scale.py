"""Scale SAE of Xu et al. (https://github.com/shahinxu/Scale-Sparse-Autoencoder)."""

from typing import Any

import torch
from einops import rearrange, reduce
from typing_extensions import override

from .multi_expert import MultiExpertFormat


class ScaleFormat(MultiExpertFormat):
    """
    Checkpoints of their Scale SAE: a multi-expert SAE whose encoders are scaled.

    ``omega`` and the learned low-pass map become a part of the encoder.
    """

    name = "Scale SAE of Xu et al."
    marks = frozenset({"gate.weight", "omega"})
    axes = {
        **MultiExpertFormat.axes,
        "omega": "N",
        "beta": "N",
        "lp_transform_encoder.weight": "dd",
        "lp_transform_decoder.weight": "dd",
    }

    @override
    def check(self, state: dict[str, Any]) -> dict[str, int]:
        sizes = super().check(state)
        _refuse_other_versions(state)
        return sizes

    @override
    def tensors(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        converted = super().tensors(state)
        omega = state["omega"].double()
        low_pass = state["lp_transform_encoder.weight"].double()
        W_enc = rearrange(converted["W_enc"].double(), "d (N n) -> d N n", N=len(omega))
        low = (low_pass @ reduce(W_enc, "d N n -> d N", "mean")).unsqueeze(-1)
        scaled = W_enc + omega.unsqueeze(-1) * (W_enc - low)
        return {**converted, "W_enc": rearrange(scaled, "d N n -> d (N n)")}

    @override
    def metadata(self, state: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {"omega": state["omega"].tolist()}


def _refuse_other_versions(state: dict[str, torch.Tensor]) -> None:
    """
    Refuse Scale SAEs of versions of the authors' code that compute something else.

    Their parameters have the same names, but training moved different ones of them away
    from where they start (0, and the identity).
    """

    def is_identity(name: str) -> bool:
        return torch.equal(state[name], torch.eye(len(state[name])).to(state[name]))

    omega = state["omega"]
    reason = None
    if state["beta"].any() or not is_identity("lp_transform_decoder.weight"):
        reason = (
            "beta or lp_transform_decoder.weight was trained, so that it is of one "
            "that scales decoders, too"
        )
    elif not omega.any() and not is_identity("lp_transform_encoder.weight"):
        reason = (
            "lp_transform_encoder.weight was trained and omega was not, so that it is "
            "of one that removes low-pass parts"
        )
    elif omega[0] and len(omega) > 1 and not omega[1:].any():
        reason = (
            "only the first omega was trained, so that it is of one that applies it to "
            "all experts"
        )
    if reason:
        raise ValueError(
            "of a version of the authors' code that computes something other than "
            f"the published Scale SAE: {reason}"
        )

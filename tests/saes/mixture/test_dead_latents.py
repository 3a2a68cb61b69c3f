"""Masks of dead latents, as SAELens's trainer gives them."""

import re
from typing import Any

import pytest
import torch
from helpers import DEAD, X, step_input


@pytest.mark.parametrize(
    "mask",
    [
        DEAD[:30],
        torch.cat([DEAD, DEAD]),
        DEAD[:59],
        DEAD[:0],
        DEAD[None],
        DEAD.view(5, 12),
        DEAD[0],
        DEAD.long(),
        DEAD.double(),
    ],
    ids=lambda mask: f"{tuple(mask.shape)} {mask.dtype}",
)
@pytest.mark.parametrize("use", ["loss", "metrics"])
def test_a_mask_of_other_latents_is_refused(make: Any, mask: torch.Tensor, use: str):
    sae = make(aux_loss_coefficient=1.0 if use == "loss" else 0.0)
    message = re.escape(
        "dead_neuron_mask must have shape (60,) and dtype torch.bool, got "
        f"{tuple(mask.shape)} and {mask.dtype}"
    )
    with pytest.raises(ValueError, match=message):
        sae.training_forward_pass(step_input(X, mask, is_logging_step=True))


def test_a_mask_may_be_strided(make: Any):
    sae = make()
    strided = torch.stack([DEAD, ~DEAD], dim=-1)[:, 0]
    want = sae.training_forward_pass(step_input(X, DEAD, is_logging_step=True))
    got = sae.training_forward_pass(step_input(X, strided, is_logging_step=True))
    assert torch.equal(got.loss, want.loss)

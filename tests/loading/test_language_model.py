"""Choice of bfloat16 for a language model."""

import time
from typing import Any

import pytest
import torch

from sae_lens_scale.loading.language_model import fast_bfloat16


def seconds(dtype: torch.dtype) -> float:
    """Time a product of a language model's size; the best of a few."""
    x, W = torch.randn(512, 576).to(dtype), torch.randn(576, 576).to(dtype)
    laps = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(x, W)
        laps.append(time.perf_counter() - start)
    return min(laps)


def test_bfloat16_is_chosen_where_it_does_not_take_many_times_as_long():
    # Measured: 8 times as long where it is emulated, in products four and more times as large.
    ratio = seconds(torch.bfloat16) / seconds(torch.float32)
    if fast_bfloat16("cpu"):
        assert ratio < 4
    else:
        assert ratio > 1


@pytest.mark.parametrize(
    ("asked", "mkldnn", "fast"),
    [
        (lambda: True, True, True),
        (lambda: False, True, False),
        (lambda: True, False, False),
        (None, True, False),  # a torch that cannot be asked
    ],
)
def test_CPUs_are_asked_for_bfloat16_products(
    asked: Any, mkldnn: bool, fast: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        torch.ops.mkldnn, "_is_mkldnn_bf16_supported", asked, raising=False
    )
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)
    for device in ("cpu", torch.device("cpu")):
        assert fast_bfloat16(device) is fast


def test_emulation_of_bfloat16_does_not_count_on_GPUs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation,
    )
    assert not fast_bfloat16("cuda")

"""Choice of bfloat16 for a language model."""

import time

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


@pytest.mark.parametrize("known", [True, False])
def test_CPUs_are_asked_for_bfloat16_products(
    known: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: known, raising=False
    )
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert fast_bfloat16(torch.device("cpu")) is known
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not fast_bfloat16("cpu")


def test_a_torch_that_cannot_be_asked_runs_in_float32(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    assert not fast_bfloat16("cpu")


def test_emulation_of_bfloat16_does_not_count_on_GPUs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation,
    )
    assert not fast_bfloat16("cuda")

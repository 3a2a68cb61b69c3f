"""Where a language model runs in bfloat16."""

import time

import pytest
import torch

from sae_lens_scale.experiments.precision import fast_bfloat16


def seconds(dtype: torch.dtype) -> float:
    """CPU seconds of a product of a language model's size, the best of a few."""
    x, W = torch.randn(2048, 576).to(dtype), torch.randn(576, 1536).to(dtype)
    laps = []
    for _ in range(5):
        start = time.process_time()
        torch.mm(x, W)
        laps.append(time.process_time() - start)
    return min(laps)


def test_bfloat16_is_chosen_where_it_is_not_many_times_as_slow():
    # Emulated it takes 8 times as long as float32, with instructions for it less.
    slow = seconds(torch.bfloat16) > 4 * seconds(torch.float32)
    assert fast_bfloat16("cpu") is not slow


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


def test_emulation_of_bfloat16_does_not_count_on_GPUs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation,
    )
    assert not fast_bfloat16("cuda")

"""Memory of a training step: what the active latents need, nothing as wide as d_sae."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import scale_sae, step_input, switch_sae
from memory import peak_bytes

TOKENS, D_IN, D_SAE, K = 4096, 64, 16_384, 8
# Memory of the part of a batch that is computed at a time.
SCRATCH = 4 << 20


SIZES: dict[str, Any] = {
    "d_in": D_IN,
    "d_sae": D_SAE,
    "k": K,
    "num_experts": 64,
    "dtype": "float32",
}


@pytest.mark.parametrize(
    ("maker", "settings"),
    [
        (scale_sae, {}),
        (scale_sae, {"experts_per_token": 4}),
        (scale_sae, {"decomposition": "identity"}),
        (scale_sae, {"rescale_acts_by_decoder_norm": False}),
        (switch_sae, {}),
        (scale_sae, {"multi_topk_coefficient": 0.125}),
    ],
    # The same in every process, which those of functions are not.
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
@pytest.mark.parametrize("share_dead", [0.0, 0.05])
def test_a_training_step_needs_memory_for_active_latents_only(
    maker: Any, settings: dict[str, Any], share_dead: float, tmp_path: Path
):
    sae = maker(**SIZES, **settings)
    x = torch.randn(TOKENS, D_IN)
    dead = torch.rand(D_SAE) < share_dead

    def step() -> None:
        sae.training_forward_pass(step_input(x, dead)).loss.backward()

    step()
    sae.zero_grad()
    peak = peak_bytes(step, tmp_path / "trace.json")
    # NumPy's memory, for gradients above all, is not the allocator's.
    sae.zero_grad()
    tracemalloc.start()
    step()
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    active = sae.cfg.experts_per_token * sae.cfg.expert_size
    learning = 4 * K if sae.cfg.multi_topk_coefficient else K
    bound = 3 * TOKENS * (active + learning + D_IN) * 4
    # Dead latents bring gradients of the weights' size, for each of the two.
    bound += 3 * 2 * D_IN * D_SAE * 4 if share_dead else 0
    dense = TOKENS * D_SAE * 4
    assert bound + SCRATCH < dense / 2, "a dense tensor would go unnoticed"
    assert peak < bound + SCRATCH
    assert numpy_peak < SCRATCH, "gradients did not go into memory that was there"


def test_a_dense_training_step_is_noticed(tmp_path: Path):
    sae = scale_sae(**SIZES, use_sparse_activations=False)
    x = torch.randn(TOKENS, D_IN)

    def step() -> None:
        sae.training_forward_pass(step_input(x)).loss.backward()

    assert peak_bytes(step, tmp_path / "trace.json") > TOKENS * D_SAE * 4

"""FLOPs per token, against what torch's counter sees of real training steps."""

import json
from dataclasses import FrozenInstanceError, asdict
from typing import Any

import pytest
import torch
from helpers import randomize, step_input
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig
from torch.utils.flop_counter import FlopCounterMode

from reproduction.flops import FlopsPerToken, flops_per_token
from sae_lens_scale import ScaleTrainingSAEConfig, SwitchTrainingSAEConfig

aten: Any = torch.ops.aten
D_IN, D_SAE, K, EXPERTS = 16, 48, 5, 8
DENSE: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE}
TOPK: dict[str, Any] = {**DENSE, "architecture": "topk", "k": K}
MIXTURE: dict[str, Any] = {**DENSE, "k": K, "num_experts": EXPERTS}
SCALE = {**MIXTURE, "architecture": "scale"}
NO_ROUTING: dict[str, Any] = {"gate": "uniform", "load_balance_coefficient": 0.0}


def _stored(matrix: torch.Tensor) -> int:
    return matrix._nnz() if matrix.is_sparse else matrix.numel()


def _mm(a: torch.Tensor, b: torch.Tensor, **_: Any) -> int:
    # The counter's own formula takes a sparse matrix for a dense one.
    return 2 * _stored(a) * b.shape[-1]


def _sparse_addmm(_out: Any, a: torch.Tensor, b: torch.Tensor, **_: Any) -> int:
    return _mm(a, b)


def _sampled_addmm(
    pattern: torch.Tensor, rows: torch.Tensor, _weights: Any, **_: Any
) -> int:
    return 2 * pattern.values().numel() * rows.shape[-1]


def _embedding_bag(
    weights: torch.Tensor, indices: torch.Tensor, *_args: Any, **_: Any
) -> int:
    return 2 * indices.numel() * weights.shape[-1]


# Operations that torch's counter does not know, or takes for something larger.
FORMULAS = {
    aten.mm: _mm,
    aten._sparse_addmm: _sparse_addmm,
    aten.sparse_sampled_addmm: _sampled_addmm,
    aten._embedding_bag: _embedding_bag,
    aten._embedding_bag_forward_only: _embedding_bag,
}
for formula in FORMULAS.values():
    setattr(formula, "_get_raw", True)  # They want tensors, not their shapes.


def count(sae: Any, tokens: int, dead: torch.Tensor | None) -> tuple[int, int]:
    """FLOPs of a training step's forward and backward pass."""
    x = torch.randn(tokens, D_IN, generator=torch.Generator().manual_seed(0))
    step = step_input(x, dead)
    step.coefficients.update(l1=1.0, l0=1.0)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as forward:
        loss = sae.training_forward_pass(step).loss
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def count_per_token(
    settings: dict[str, Any], dead: torch.Tensor | None = None
) -> tuple[float, float]:
    """The same for each further token, so that what a batch costs once drops out."""
    sae = TrainingSAE.from_dict(settings)
    randomize(sae)
    few, many = count(sae, 32, dead), count(sae, 96, dead)
    return (many[0] - few[0]) / 64, (many[1] - few[1]) / 64


@pytest.mark.parametrize(
    "settings",
    [
        TOPK,
        {**TOPK, "apply_b_dec_to_input": False},
        {**TOPK, "use_sparse_activations": True, "rescale_acts_by_decoder_norm": False},
        {**DENSE, "architecture": "gated"},
        {**DENSE, "architecture": "gated", "apply_b_dec_to_input": False},
        {**DENSE, "architecture": "standard"},
        {**DENSE, "architecture": "jumprelu"},
        {**MIXTURE, "architecture": "switch"},
        SCALE,
        # As "full" in presets.
        {**MIXTURE, "architecture": "switch", "num_experts": 1, **NO_ROUTING},
        {**SCALE, **NO_ROUTING},
        {**SCALE, **NO_ROUTING, "use_sparse_activations": False},
        {**SCALE, "gate": "uniform"},
        {**SCALE, "experts_per_token": 3, "num_shared_experts": 1},
        {**SCALE, "experts_per_token": 3},
        {**SCALE, "feature_scaling": False},
        {**SCALE, "decomposition": "identity"},
        {**SCALE, "decomposition": "learned"},
        {**SCALE, "decomposition": "learned", "apply_b_dec_to_input": False},
        {**SCALE, "rescale_acts_by_decoder_norm": False},
        {**SCALE, "gate": "softmax", "topk_over": "gated_activations"},
        {**SCALE, "use_sparse_activations": False},
        {**SCALE, "k": 2, "multi_topk_coefficient": 0.5},
        # Of 12 candidates 7 are left, not 15.
        {**SCALE, "multi_topk_coefficient": 0.5},
        {**SCALE, "multi_topk_coefficient": 0.5, "use_sparse_activations": False},
        {
            **SCALE,
            "use_sparse_activations": False,
            "decomposition": "learned",
            "apply_b_dec_to_input": False,
        },
    ],
    ids=lambda s: ", ".join(str(v) for n, v in s.items() if n not in (*MIXTURE, "k")),
)
@pytest.mark.parametrize("with_dead", [False, True], ids=["", "dead latents"])
def test_training_step_costs_what_torch_counts(
    settings: dict[str, Any], with_dead: bool
):
    dead, most_dead = None, 0
    if with_dead:
        # Of eight experts these have 1, 0, 1, 2, 0, 0, 1, 0 of them.
        dead = torch.zeros(D_SAE, dtype=torch.bool)
        dead[[3, 13, 18, 23, 40]] = True
        most_dead = 2 if settings.get("num_experts", 1) > 1 else 5
    flops = flops_per_token(TrainingSAEConfig.from_dict(settings), most_dead)
    assert (flops.forward, flops.backward) == count_per_token(settings, dead)


@pytest.mark.parametrize(
    "settings",
    [
        TOPK,
        {**DENSE, "architecture": "gated"},
        {**DENSE, "architecture": "standard"},
        {**DENSE, "architecture": "jumprelu"},
        {**MIXTURE, "architecture": "switch"},
        {**SCALE, "experts_per_token": 3},
    ],
    ids=lambda s: s["architecture"],
)
def test_reconstruction_costs_what_torch_counts(settings: dict[str, Any]):
    sae = SAE.from_dict(settings)
    randomize(sae)
    seen = []
    for tokens in (32, 96):
        with (
            torch.no_grad(),
            FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter,
        ):
            sae(torch.randn(tokens, D_IN))
        seen.append(counter.get_total_flops())
    flops = flops_per_token(SAEConfig.from_dict(settings))
    assert flops.total == flops.forward == (seen[1] - seen[0]) / 64
    assert flops.backward == 0


def test_the_papers_SAEs_agree_in_the_encoder_and_in_nothing_else():
    wide: dict[str, Any] = {"d_in": 576, "d_sae": 18_432, "k": 32}
    ours = {**wide, "multi_topk_coefficient": 0.0}
    scale = [
        flops_per_token(
            ScaleTrainingSAEConfig(
                **ours, num_experts=n, experts_per_token=e, num_shared_experts=0
            )
        )
        for n, e in ((64, 2), (128, 4), (256, 8))
    ]
    switch = flops_per_token(SwitchTrainingSAEConfig(**ours, num_experts=32))
    topk = flops_per_token(
        TrainingSAEConfig.from_dict({**wide, "d_sae": 576, "architecture": "topk"})
    )
    assert {f.encoder for f in (*scale, switch, topk)} == {2 * 576 * 576}
    per_column = [f.total // (2 * 576) for f in (*scale, switch, topk)]
    # Router twice, encoder 576, k forward and 3 k backward, and omega's e.
    assert per_column == [
        64 * 2 + 576 + 4 * 32 + 2,
        128 * 2 + 576 + 4 * 32 + 4,
        256 * 2 + 576 + 4 * 32 + 8,
        32 * 2 + 576 + 4 * 32,
        6 * 576,
    ]


def test_dead_latents_cost_nothing_without_a_loss_for_them():
    for settings in (
        {**SCALE, "aux_loss_coefficient": 0.0},
        {**DENSE, "architecture": "standard"},
        {**DENSE, "architecture": "gated"},
    ):
        cfg = TrainingSAEConfig.from_dict(settings)
        assert flops_per_token(cfg, 3) == flops_per_token(cfg)
    inference = SAEConfig.from_dict(SCALE)
    assert flops_per_token(inference, 3) == flops_per_token(inference)


def test_account_is_immutable_and_keeps_its_sums_as_JSON():
    flops = FlopsPerToken(router=1, encoder=20, decoder=300, backward=4_000)
    assert json.loads(json.dumps(asdict(flops))) == {
        "router": 1,
        "encoder": 20,
        "decoder": 300,
        "backward": 4_000,
        "forward": 321,
        "total": 4_321,
    }
    with pytest.raises(FrozenInstanceError):
        setattr(flops, "router", 2)


def test_refuses_other_architectures_and_impossible_numbers_of_dead_latents():
    with pytest.raises(ValueError, match="got 'batchtopk'"):
        flops_per_token(BatchTopKTrainingSAEConfig(**DENSE, k=K))
    cfg = ScaleTrainingSAEConfig(**MIXTURE)
    assert flops_per_token(cfg, 6).total > flops_per_token(cfg, 5).total
    for dead in (-1, 7):
        with pytest.raises(ValueError, match=f"from 0 to 6, got {dead}"):
            flops_per_token(cfg, dead)
    with pytest.raises(ValueError, match="from 0 to 48, got 49"):
        flops_per_token(TrainingSAEConfig.from_dict(TOPK), 49)

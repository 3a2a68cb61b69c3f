"""Settings of runs, and their names."""

from dataclasses import replace
from typing import Any

import pytest
from sae_lens.saes.topk_sae import TopKTrainingSAEConfig

from reproduction.settings import RunSettings
from sae_lens_scale import SwitchTrainingSAEConfig

SCALE = RunSettings("scale", {"d_sae": 64, "num_experts": 8, "k": 4})


def test_a_name_says_what_people_look_for_and_tells_all_settings_apart():
    assert SCALE.label == "Scale 8/2"
    assert SCALE.name.startswith("scale-8-2-k4-s0-")
    assert RunSettings("topk", {"d_sae": 64, "k": 4}).label == "TopK 64"
    assert RunSettings("full", {"d_sae": 64, "k": 4}).label == "Full TopK 64"
    assert RunSettings("switch", {"d_sae": 64, "k": 2}, variant="x").label == (
        "Switch 32 x"
    )
    gated = RunSettings("gated", {"d_sae": 64, "l1_coefficient": 0.5}, seed=3)
    assert gated.name.startswith("gated-64-l0.5-s3-")
    others = [
        replace(SCALE, **change)
        for change in (
            {"lr": 1e-3},
            {"seed": 1},
            {"lr_factors": {"omega": 2.0}},
            {"sae": {**SCALE.sae, "gate": "softmax"}},
            {"initialization": "default"},
        )
    ]
    assert len({run.name for run in (SCALE, *others)}) == 6


def test_a_name_does_not_depend_on_how_settings_are_written():
    reordered = RunSettings(
        "scale", {"k": 4, "num_experts": 8, "d_sae": 64}, seed=0, lr=1.6e-3
    )
    assert reordered.name == SCALE.name
    explicit = replace(SCALE, sae={**SCALE.sae, "experts_per_token": 2}, variant="")
    assert explicit.name == SCALE.name
    # Records are found again by later versions.
    assert SCALE.name == "scale-8-2-k4-s0-239dca18"


def test_the_config_is_SAELenss_own():
    cfg = RunSettings("topk", {"d_sae": 64, "k": 4}).sae_config(12)
    assert isinstance(cfg, TopKTrainingSAEConfig)
    assert (cfg.d_in, cfg.d_sae, cfg.k) == (12, 64, 4)
    assert cfg.normalize_activations == "expected_average_only_in"
    full = RunSettings("full", {"d_sae": 64, "k": 4}).sae_config(12)
    assert isinstance(full, SwitchTrainingSAEConfig)
    assert (full.num_experts, full.gate) == (1, "uniform")
    assert full.load_balance_coefficient == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "nonsense"}, "architecture 'nonsense' is unknown"),
        ({"sae": {"k": 4}}, r"sae must have d_sae .* got \['k'\]"),
        ({"sae": {"d_sae": 64, "nonsense": 1}}, r"got \['nonsense'\]"),
        ({"sae": {"d_sae": 64, "d_in": 3}}, r"got \['d_in'\]"),
        ({"sae": {"d_sae": 65}}, "d_sae must be divisible by num_experts"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"training_tokens": 100}, "training_tokens must be at least batch_size"),
        ({"lr_warm_up_fraction": 0.9}, "must be shares of the steps, got 0.9"),
        ({"lr_decay_fraction": -0.1}, "must be shares of the steps"),
        ({"initialization": "nonsense"}, "initialization must be"),
        ({"curve_tokens": -1}, "curve_tokens must be at least 0"),
        ({"training_tokens": 1e4 + 0.5}, "training_tokens must be a whole number"),
        ({"seed": "0"}, "seed must be a whole number, got '0'"),
        ({"sae": {"d_sae": 64.5}}, "d_sae must be a whole number, got 64.5"),
        ({"lr_factors": {"W_router": "0.1"}}, r"lr_factors\['W_router'\] must be a"),
        ({"lr_factors": 0.1}, "lr_factors must be an object such as .* got 0.1"),
        ({"autocast": "False"}, "autocast must be true or false, got 'False'"),
        ({"variant": 5}, "variant must be a text, got 5"),
        ({"lr_end": "0.1"}, "lr_end must be a number or null, got '0.1'"),
        (
            {"sae": {"d_sae": 64, "rescale_acts_by_decoder_norm": 1}},
            "rescale_acts_by_decoder_norm must be true or false, got 1",
        ),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        replace(SCALE, **change).sae_config(12)


def test_a_number_has_one_name_however_it_is_written():
    floats = RunSettings(
        "scale",
        {"d_sae": 64.0, "num_experts": 8, "k": 4.0, "aux_loss_coefficient": 1},
        lr=1,
        lr_factors={"b_dec": 1},
        training_tokens=1e6,  # type: ignore[reportArgumentType]
    )
    ints = RunSettings(
        "scale",
        {"d_sae": 64, "num_experts": 8, "k": 4, "aux_loss_coefficient": 1.0},
        lr=1.0,
        lr_factors={"b_dec": 1.0},
        training_tokens=1_000_000,
    )
    assert floats.name == ints.name
    assert type(floats.sae["k"]) is type(floats.training_tokens) is int


def test_a_mixture_of_one_expert_is_for_full_to_decide():
    with pytest.raises(ValueError, match=r"'full' has not, got \['num_experts'\]"):
        RunSettings("full", {"d_sae": 64, "k": 4, "num_experts": 2}).sae_config(12)
    assert "num_experts" in SCALE.sae_fields()

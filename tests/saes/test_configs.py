"""Configs: defaults that SAELens's command line accepts, round trips, refusals."""

from inspect import cleandoc
from typing import Any

import pytest
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEConfig, TrainingSAEConfig

from sae_lens_scale import (
    ScaleSAEConfig,
    ScaleTrainingSAEConfig,
    SwitchSAEConfig,
    SwitchTrainingSAEConfig,
)

ALL = [
    ScaleSAEConfig,
    ScaleTrainingSAEConfig,
    SwitchSAEConfig,
    SwitchTrainingSAEConfig,
]
TRAINING = [ScaleTrainingSAEConfig, SwitchTrainingSAEConfig]
SCALE = [ScaleSAEConfig, ScaleTrainingSAEConfig]


@pytest.mark.parametrize("architecture", ["scale", "switch"])
def test_command_line_defaults_are_valid(architecture: str):
    cfg = _parse_cfg_args(["--architecture", architecture])
    assert cfg.sae.architecture() == architecture
    assert (cfg.sae.d_in, cfg.sae.d_sae) == (512, 1024)


def test_command_line_sets_our_fields():
    cfg = _parse_cfg_args(
        [
            "--architecture",
            "scale",
            "--num_experts",
            "16",
            "--experts_per_token",
            "4",
            "--k",
            "8",
            "--gate",
            "softmax",
            "--topk_over",
            "gated_activations",
            "--feature_scaling",
            "False",
            "--load_balance_coefficient",
            "0.5",
        ]
    )
    assert isinstance(cfg.sae, ScaleTrainingSAEConfig)
    assert cfg.sae.num_experts == 16
    assert cfg.sae.experts_per_token == 4
    assert cfg.sae.k == 8
    assert cfg.sae.gate == "softmax"
    assert cfg.sae.topk_over == "gated_activations"
    assert cfg.sae.feature_scaling is False
    assert cfg.sae.load_balance_coefficient == 0.5


@pytest.mark.parametrize("config_class", TRAINING)
def test_training_config_survives_a_round_trip(config_class: Any):
    cfg = config_class(
        d_in=8, d_sae=64, num_experts=4, k=3, gate="softmax", aux_loss_coefficient=0.5
    )
    again = TrainingSAEConfig.from_dict(cfg.to_dict())
    assert type(again) is config_class
    assert again.to_dict() == cfg.to_dict()
    assert type(again) is get_sae_training_class(cfg.architecture())[1]


@pytest.mark.parametrize("config_class", TRAINING)
def test_inference_config_of_a_training_config_survives_a_round_trip(
    config_class: Any,
):
    cfg = config_class(d_in=8, d_sae=64, num_experts=4, k=3, gate="uniform")
    inference = cfg.get_inference_sae_cfg_dict()
    again = SAEConfig.from_dict(inference)
    assert again.to_dict() == inference
    assert type(again) is get_sae_class(cfg.architecture())[1]
    for name in ("num_experts", "k", "gate", "topk_over", "experts_per_token"):
        assert getattr(again, name) == getattr(cfg, name)
    details = inference["metadata"]["training_architecture_details"]
    assert details["load_balance_coefficient"] == cfg.load_balance_coefficient


@pytest.mark.parametrize("config_class", ALL)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_experts": 7}, "d_sae must be divisible .* d_sae=64 and num_experts=7"),
        ({"num_experts": 0}, "num_experts must be a positive integer, got 0"),
        ({"num_experts": 4.0}, r"num_experts must be a positive integer, got 4\.0"),
        ({"num_experts": "4"}, "num_experts must be a positive integer, got '4'"),
        ({"d_sae": -64}, "d_sae must be a positive integer, got -64"),
        ({"k": True}, "k must be a positive integer, got True"),
        ({"k": 65}, "k must be at most .*, got 65"),
        ({"gate": "hard"}, "gate must be one of .*'softmax'.*, got 'hard'"),
        ({"gate": None}, "gate must be one of .*, got None"),
        ({"topk_over": "gates"}, "topk_over must be one of .*, got 'gates'"),
        ({"normalize_activations": "l2"}, "normalize_activations .* l2"),
    ],
    ids=str,
)
def test_bad_fields_are_refused_by_name_and_value(
    config_class: Any, overrides: dict[str, Any], message: str
):
    settings = {"d_in": 8, "d_sae": 64, "num_experts": 4, "k": 3}
    with pytest.raises(ValueError, match=message):
        config_class(**{**settings, **overrides})


@pytest.mark.parametrize("config_class", SCALE)
@pytest.mark.parametrize("shared", [-1, 2, 1.0, True])
def test_shared_experts_must_leave_the_router_a_choice(config_class: Any, shared: Any):
    with pytest.raises(ValueError, match=f"num_shared_experts must be .* {shared}"):
        config_class(d_in=8, d_sae=64, num_experts=4, num_shared_experts=shared, k=3)


@pytest.mark.parametrize("config_class", SCALE)
def test_more_experts_per_token_than_experts_are_refused(config_class: Any):
    with pytest.raises(ValueError, match="experts_per_token must be at most .* got 5"):
        config_class(d_in=8, d_sae=64, num_experts=4, experts_per_token=5, k=3)


@pytest.mark.parametrize("config_class", SCALE)
def test_k_may_reach_the_candidates_and_no_further(config_class: Any):
    settings = {"d_in": 8, "d_sae": 64, "num_experts": 4, "experts_per_token": 2}
    assert config_class(**settings, k=32).k == 32
    with pytest.raises(ValueError, match="k must be at most the 32 latents .* got 33"):
        config_class(**settings, k=33)


@pytest.mark.parametrize("config_class", TRAINING)
@pytest.mark.parametrize(
    "name",
    ["load_balance_coefficient", "aux_loss_coefficient", "multi_topk_coefficient"],
)
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "1", None])
def test_coefficients_that_make_no_sense_are_refused(
    config_class: Any, name: str, value: Any
):
    with pytest.raises(ValueError, match=f"{name} must be .* got {value!r}"):
        config_class(d_in=8, d_sae=64, num_experts=4, k=3, **{name: value})


@pytest.mark.parametrize("config_class", TRAINING)
@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_losses_of_residuals_with_run_time_normalisation_are_refused(
    config_class: Any, norm: Any
):
    settings = {"d_in": 8, "d_sae": 64, "num_experts": 4, "k": 3}
    with pytest.raises(ValueError, match=f"aux_loss_coefficient must be 0 .*{norm}"):
        config_class(**settings, normalize_activations=norm)
    settings |= {"normalize_activations": norm, "aux_loss_coefficient": 0}
    config_class(**settings)
    with pytest.raises(ValueError, match=f"multi_topk_coefficient must be 0 .*{norm}"):
        config_class(**settings, multi_topk_coefficient=0.125)


@pytest.mark.parametrize("value", [1, "False", None])
@pytest.mark.parametrize(
    "name",
    [
        "feature_scaling",
        "rescale_acts_by_decoder_norm",
        "use_sparse_activations",
        "apply_b_dec_to_input",
    ],
)
def test_what_is_no_bool_is_refused(name: str, value: Any):
    with pytest.raises(ValueError, match=f"{name} must be a bool, got {value!r}"):
        ScaleTrainingSAEConfig(d_in=512, d_sae=1024, **{name: value})


def test_unknown_decomposition_is_refused():
    with pytest.raises(ValueError, match="decomposition must be one of .*'median'"):
        ScaleTrainingSAEConfig(
            d_in=512,
            d_sae=1024,
            decomposition="median",  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("config_class", ALL)
def test_every_field_is_documented(config_class: Any):
    text = cleandoc(config_class.__doc__)
    for name in config_class.__dataclass_fields__:
        assert f"\n    {name} (" in text, name

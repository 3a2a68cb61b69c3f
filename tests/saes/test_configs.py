"""Configs: defaults that SAELens's command line accepts, round trips, refusals."""

import copy
import dataclasses
import json
import pickle
import re
from inspect import cleandoc
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DEAD, X, assert_close, exported, step_input
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEConfig, TrainingSAE, TrainingSAEConfig

from sae_lens_scale import (
    ScaleSAEConfig,
    ScaleTrainingSAEConfig,
    SwitchSAEConfig,
    SwitchTrainingSAEConfig,
)

TRAINING = [ScaleTrainingSAEConfig, SwitchTrainingSAEConfig]
SCALE = [ScaleSAEConfig, ScaleTrainingSAEConfig]
ALL = [*SCALE, SwitchSAEConfig, SwitchTrainingSAEConfig]
SMALL: dict[str, Any] = {"d_in": 8, "d_sae": 64, "num_experts": 4, "k": 3}
E_2 = {"experts_per_token": 2}


def small(config_class: Any) -> dict[str, Any]:
    """Settings of a small SAE; of a Scale SAE, two experts to a token."""
    return SMALL | (E_2 if config_class in SCALE else {})


both_training = pytest.mark.parametrize("config_class", TRAINING)


@pytest.mark.parametrize("architecture", ["scale", "switch"])
def test_command_line_defaults_are_valid(architecture: str):
    cfg = _parse_cfg_args(["--architecture", architecture])
    assert cfg.sae.architecture() == architecture
    assert (cfg.sae.d_in, cfg.sae.d_sae) == (512, 1024)


def test_command_line_sets_our_fields():
    settings = {
        "num_experts": 16,
        "experts_per_token": 4,
        "k": 8,
        "gate": "softmax",
        "topk_over": "gated_activations",
        "feature_scaling": False,
        "load_balance_coefficient": 0.5,
    }
    args = [part for name, value in settings.items() for part in (f"--{name}", value)]
    cfg: Any = _parse_cfg_args(["--architecture", "scale", *map(str, args)]).sae
    assert isinstance(cfg, ScaleTrainingSAEConfig)
    assert {name: getattr(cfg, name) for name in settings} == settings
    assert cfg.feature_scaling is False


@both_training
def test_configs_survive_dicts_json_pickle_and_copies(config_class: Any):
    cfg = config_class(**small(config_class), gate="softmax", aux_loss_coefficient=0.5)
    cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    runner = LanguageModelSAERunnerConfig(
        sae=cfg, model_name="gpt2", hook_name=cfg.metadata.hook_name
    )
    written = json.loads(json.dumps(runner.to_dict()))
    for other in (
        TrainingSAEConfig.from_dict(cfg.to_dict()),
        LanguageModelSAERunnerConfig.from_dict(written).sae,
        pickle.loads(pickle.dumps(cfg)),
        copy.deepcopy(cfg),
    ):
        assert type(other) is config_class
        assert other.to_dict() == cfg.to_dict()
    assert get_sae_training_class(cfg.architecture())[1] is config_class
    changed = dataclasses.replace(cfg, k=2)
    assert (changed.k, cfg.k) == (2, 3)
    with pytest.raises(ValueError, match="k must be at most"):
        dataclasses.replace(cfg, k=61)


@both_training
def test_inference_config_survives_a_round_trip_and_tells_how_it_was_trained(
    config_class: Any,
):
    cfg = config_class(
        **small(config_class),
        gate="uniform",
        load_balance_coefficient=0.5,
        multi_topk_coefficient=0.0,
        initialize_from_activations=False,
        router_lr_factor=0.25,
    )
    saved = cfg.get_inference_sae_cfg_dict()
    again = SAEConfig.from_dict(saved)
    assert again.to_dict() == saved
    assert type(again) is get_sae_class(cfg.architecture())[1]
    for name in ("num_experts", "k", "gate", "topk_over", "experts_per_token"):
        assert getattr(again, name) == getattr(cfg, name)
    details = {
        "decoder_init_norm": 0.1,
        "use_sparse_activations": True,
        "load_balance_coefficient": 0.5,
        "aux_loss_coefficient": 1 / 8,
        "multi_topk_coefficient": 0.0,
        "initialize_from_activations": False,
        "router_lr_factor": 0.25,
    }
    if cfg.architecture() == "scale":
        details |= {"feature_scaling": True, "decomposition": "mean"}
    assert saved["metadata"]["training_architecture"] == cfg.architecture()
    assert saved["metadata"]["training_architecture_details"] == details


@both_training
def test_what_a_sweep_script_hands_over_builds_trains_and_can_be_saved(
    config_class: Any, tmp_path: Any
):
    cfg = config_class(
        d_in=np.int64(10),
        d_sae=np.int32(60),
        num_experts=np.int64(5),
        k=np.uint8(6),
        gate=np.str_("softmax"),
        apply_b_dec_to_input=np.True_,
        load_balance_coefficient=np.float32(0.5),
        aux_loss_coefficient=np.int64(1),
        decoder_init_norm=np.float32(0.5),
        router_lr_factor=np.float32(0.5),
        initialize_from_activations=np.True_,
        dtype=torch.float64,
        device=torch.device("cpu"),
        **({"experts_per_token": np.int64(2)} if config_class in SCALE else {}),
    )
    assert (cfg.d_in, cfg.k, cfg.load_balance_coefficient) == (10, 6, 0.5)
    assert (cfg.dtype, cfg.device) == ("float64", "cpu")
    sae: Any = TrainingSAE.from_dict(cfg.to_dict())
    sae.training_forward_pass(step_input(X, DEAD)).loss.backward()
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert loaded.cfg.to_dict() == sae.cfg.to_dict()
    assert_close(exported(sae, tmp_path / "export")(X), sae(X))


NAN, INF = float("nan"), float("inf")
NO_COEFFICIENTS = [-0.1, NAN, INF, "1", None, True, 10**400, np.float32("nan")]
NO_BOOLS = [1, "False", None]
# Configs, a field, what it must be, and values that are not.
BAD_FIELDS: list[tuple[list[Any], str, str, list[Any]]] = [
    (ALL, "num_experts", "a positive integer", [0, 4.0, "4", None, [4]]),
    (ALL, "d_sae", "a positive integer", [-64]),
    (ALL, "d_sae", "divisible by num_experts", [66]),
    (ALL, "k", "a positive", [True, np.True_, np.float64(3), torch.tensor(3)]),
    (ALL, "k", "at most", [65]),
    (ALL, "gate", "one of .*'softmax'", ["hard", None, ["softmax"]]),
    (ALL, "topk_over", "one of", ["gates", {}]),
    (ALL, "reshape_activations", "one of .*'hook_z'", ["hook_q", None, True]),
    (SCALE, "num_shared_experts", "an integer from 0", [-1, 2, 1.0, True]),
    (SCALE, "experts_per_token", "at most", [5]),
    (TRAINING, "load_balance_coefficient", "a finite number", NO_COEFFICIENTS),
    (TRAINING, "aux_loss_coefficient", "a finite number", NO_COEFFICIENTS),
    (TRAINING, "aux_loss_coefficient", "a finite number", [torch.tensor(0.1)]),
    (TRAINING, "multi_topk_coefficient", "a finite number", NO_COEFFICIENTS),
    (TRAINING, "router_lr_factor", "a finite number above 0", NO_COEFFICIENTS),
    (TRAINING, "router_lr_factor", "a finite number above 0", [0, 0.0]),
    (TRAINING, "initialize_from_activations", "a bool", NO_BOOLS),
    (TRAINING, "decoder_init_norm", "a finite", [0.0, -1.0, NAN, INF, "0.1", True]),
    (TRAINING, "rescale_acts_by_decoder_norm", "a bool", NO_BOOLS),
    (TRAINING, "use_sparse_activations", "a bool", NO_BOOLS),
    (TRAINING, "apply_b_dec_to_input", "a bool", NO_BOOLS),
    (TRAINING[:1], "feature_scaling", "a bool", NO_BOOLS),
    (TRAINING[:1], "decomposition", "one of", ["median"]),
]


@pytest.mark.parametrize(
    ("config_class", "name", "wanted", "value"),
    [
        pytest.param(config_class, name, wanted, value, id=f"{name}={value!s:.20}")
        for classes, name, wanted, values in BAD_FIELDS
        for config_class in classes
        for value in values
    ],
)
def test_bad_fields_are_refused_by_name_and_value(
    config_class: Any, name: str, wanted: str, value: Any
):
    shown = repr(value.item() if isinstance(value, np.generic) else value)
    message = f"{name} must be {wanted}.* got .*{re.escape(shown)}"
    settings = {**small(config_class), name: value}
    with pytest.raises(ValueError, match=message):
        config_class(**settings)
    base = TrainingSAEConfig if config_class in TRAINING else SAEConfig
    settings |= {"architecture": config_class.architecture(), "metadata": {}}
    with pytest.raises(ValueError, match=message):
        base.from_dict(settings)


@pytest.mark.parametrize("config_class", ALL)
def test_values_that_SAELens_refuses_are_refused(config_class: Any):
    with pytest.raises(ValueError, match=r"Invalid dtype: torch\.int8"):
        config_class(**small(config_class), dtype=torch.int8)
    with pytest.raises(ValueError, match="normalize_activations .* l2"):
        config_class(**small(config_class), normalize_activations="l2")


@pytest.mark.parametrize("config_class", SCALE)
def test_k_may_reach_the_candidates_and_no_further(config_class: Any):
    settings = small(config_class)
    assert config_class(**{**settings, "k": 32}).k == 32
    with pytest.raises(ValueError, match="k must be at most the 32 latents .* got 33"):
        config_class(**{**settings, "k": 33})


@pytest.mark.parametrize(
    ("experts_per_token", "shared"), [(1, 0), (7, 0), (8, 1), (20, 2)]
)
def test_an_eighth_of_the_experts_is_shared_unless_a_number_is_given(
    experts_per_token: int, shared: int
):
    settings = {**SMALL, "num_experts": 32, "k": 1}
    settings["experts_per_token"] = experts_per_token
    cfg = ScaleTrainingSAEConfig(**settings)
    assert cfg.num_shared_experts == cfg.to_dict()["num_shared_experts"] == shared
    settings["num_shared_experts"] = 0
    assert ScaleTrainingSAEConfig(**settings).num_shared_experts == 0


@both_training
@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_losses_of_residuals_with_run_time_normalisation_are_refused(
    config_class: Any, norm: Any
):
    settings = {**small(config_class), "normalize_activations": norm}
    with pytest.raises(ValueError, match=f"aux_loss_coefficient must be 0 .*{norm}"):
        config_class(**settings)
    settings["aux_loss_coefficient"] = 0
    with pytest.raises(ValueError, match=f"multi_topk_coefficient must be 0 .*{norm}"):
        config_class(**settings)
    config_class(**settings, multi_topk_coefficient=0)


@pytest.mark.parametrize("config_class", ALL)
def test_every_field_is_documented(config_class: Any):
    text = cleandoc(config_class.__doc__)
    for name in config_class.__dataclass_fields__:
        assert f"\n    {name} (" in text, name

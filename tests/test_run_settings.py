"""Settings of a run, and what it goes on from, are checked before anything is loaded."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integration.runs import HOOK, IN_STEP, make_runner, runner_config, sae_config
from sae_lens import HookedSAETransformer, LoggingConfig, TrainingSAE

from sae_lens_scale.run_settings import (
    require_checkpoint,
    require_sae_of_checkpoint,
    require_sae_of_folder,
    require_settings,
)

WHITENED: dict[str, Any] = {"normalize_activations": "covariance_whitening"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training_tokens": 1e3, "n_checkpoints": 1}, "training_tokens .* an integer"),
        ({"train_batch_size_tokens": 256.0}, "train_batch_size_tokens .* an integer"),
        ({"store_batch_size_prompts": 2.5}, "store_batch_size_prompts .* an integer"),
        ({"n_batches_for_norm_estimate": 2.0}, "n_batches_for_norm_estimate .* an int"),
        ({"n_checkpoints": -1}, "n_checkpoints must be at least 0, got -1"),
        ({"n_checkpoints": "2"}, "n_checkpoints must be at least 0, got '2'"),
        ({"lr_warm_up_steps": -1}, "lr_warm_up_steps must be at least 0, got -1"),
        ({"lr_decay_steps": -3}, "lr_decay_steps must be at least 0, got -3"),
        ({"dead_feature_window": "5"}, "dead_feature_window must be at least 0"),
        ({"autocast": "true"}, "autocast must be a bool, got 'true'"),
        ({"save_final_checkpoint": "no"}, "save_final_checkpoint must be a bool"),
    ],
)
def test_counts_and_switches_of_a_wrong_kind_are_refused(
    settings: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=f"^{message}"):
        require_settings(runner_config(sae_config("scale", **WHITENED), **settings))


def test_counts_that_SAELens_takes_are_taken():
    settings: dict[str, Any] = {"training_tokens": 1e3, "n_batches_in_buffer": 16.0}
    require_settings(runner_config(sae_config("scale"), **settings))


def test_a_buffer_has_to_hold_a_processs_share_of_a_batch():
    settings: dict[str, Any] = {
        "context_size": 16,
        "n_batches_in_buffer": 4,
        "train_batch_size_tokens": 130,
    }
    cfg = runner_config(sae_config("scale"), **settings)
    require_settings(cfg, processes=3)
    with pytest.raises(ValueError, match="hold the 65 of each process, of train_batch"):
        require_settings(cfg, processes=2)
    with pytest.raises(ValueError, match="hold train_batch_size_tokens=130, got 4$"):
        require_settings(cfg)


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_eval_batches", 0), ("n_eval_batches", "1"), ("eval_batch_size_prompts", -1)],
)
def test_settings_of_evaluations_count_where_there_are_some(name: str, value: Any):
    for every, is_evaluated in ((6, True), (7, False)):
        logger = LoggingConfig(wandb_log_frequency=10, eval_every_n_wandb_logs=every)
        cfg = runner_config(sae_config("scale"), logger=logger, **{name: value})
        if not is_evaluated:
            require_settings(cfg)
            continue
        with pytest.raises(ValueError, match=f"^{name} must be .*, got {value!r}"):
            require_settings(cfg)


@pytest.mark.parametrize("folder", ["output_path", "checkpoint_path"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("training_tokens", np.int64(512)),
        ("lr", np.float32(1e-3)),
        ("dataset_path", Path("text")),
        ("model_from_pretrained_kwargs", {"torch_dtype": torch.bfloat16}),
    ],
)
def test_what_cannot_be_saved_is_refused_if_something_is_saved(
    folder: str, name: str, value: Any, tmp_path: Path
):
    cfg = runner_config(sae_config("scale"), **{name: value})
    require_settings(cfg)
    setattr(cfg, folder, str(tmp_path))
    with pytest.raises(ValueError, match=f"^{name} cannot be saved as JSON: .*; got"):
        require_settings(cfg)


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("switch", {}, "architecture must be 'scale', as in .* trained, got 'switch'"),
        ("topk", {}, "architecture must be 'scale'"),
        ("scale", {"k": 3}, "k must be 6, as in .*, whose SAE is trained, got 3"),
        ("scale", {"d_in": 16}, "d_in must be 32"),
        ("scale", {"experts_per_token": 1}, "experts_per_token must be 2"),
    ],
)
def test_an_SAE_that_is_loaded_has_the_sizes_of_the_config(
    architecture: str, change: dict[str, Any], message: str, tmp_path: Path
):
    sae: Any = TrainingSAE.from_dict(sae_config("scale").to_dict())
    sae.save_inference_model(tmp_path)
    require_sae_of_folder(runner_config(sae_config("scale")), tmp_path)
    with pytest.raises(ValueError, match=f"^{message}"):
        other = runner_config(sae_config(architecture, **change))
        require_sae_of_folder(other, tmp_path)


@pytest.fixture(scope="module")
def whole_checkpoint(
    tiny_model: HookedSAETransformer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    settings = {**IN_STEP, "n_checkpoints": 1, "checkpoint_path": str(folder)}
    make_runner(
        runner_config(sae_config("scale", **WHITENED), **settings), tiny_model
    ).run()
    (checkpoint,) = folder.glob("*/*")
    return checkpoint


@pytest.mark.parametrize(
    "name",
    [
        "cfg.json",
        "sae_weights.safetensors",
        "trainer_state.pt",
        "activation_scaler.json",
        "activations_store_state.safetensors",
        "activation_whitening.safetensors",
    ],
)
def test_a_checkpoint_must_be_whole(name: str, whole_checkpoint: Path, tmp_path: Path):
    checkpoint = shutil.copytree(whole_checkpoint, tmp_path / "checkpoint")
    cfg = runner_config(sae_config("scale", **WHITENED), **IN_STEP)
    require_checkpoint(cfg, checkpoint)
    file = checkpoint / name
    content = file.read_bytes()
    for length in (0, len(content) // 2):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{file} is (damaged|not JSON)"):
            require_checkpoint(cfg, checkpoint)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"there is no {file}"):
        require_checkpoint(cfg, checkpoint)


def test_a_checkpoint_is_of_the_hook(whole_checkpoint: Path):
    cfg = runner_config(sae_config("scale", **WHITENED), **IN_STEP)
    for name, value, was in (
        ("hook_name", "blocks.1.hook_resid_post", HOOK),
        ("hook_head_index", 2, None),
    ):
        other = runner_config(cfg.sae, **{**IN_STEP, name: value})
        with pytest.raises(ValueError, match=f"^{name} must be {was!r}, as in "):
            require_checkpoint(other, whole_checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feature_scaling": False}, "feature_scaling must be True, as in"),
        ({"decomposition": "learned"}, "decomposition must be 'mean', as in"),
        ({"router_lr_factor": 1.0}, "router_lr_factor must be 0.125, as in"),
    ],
)
def test_a_checkpoint_is_of_the_same_parameters(
    change: dict[str, Any], message: str, whole_checkpoint: Path
):
    require_sae_of_checkpoint(sae_config("scale", **WHITENED), whole_checkpoint)
    with pytest.raises(ValueError, match=f"^{message}"):
        cfg = sae_config("scale", **{**WHITENED, **change})
        require_sae_of_checkpoint(cfg, whole_checkpoint)

"""Small runs of SAELens's runners: what the tests of running and of resuming share."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.multi_sae_training_runner import (
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.saes.sae import SAE, TrainingSAEConfig

import sae_lens_scale  # noqa: F401  (what makes the architectures known)

ARCHITECTURES = ["scale", "switch"]
HOOK = "blocks.0.hook_resid_post"


def sae_config(architecture: str, **overrides: Any) -> Any:
    """Config of a small SAE for activations of width 32; "topk" is SAELens's own."""
    settings: dict[str, Any] = {
        "architecture": architecture,
        "d_in": 32,
        "d_sae": 128,
        "k": 6,
        "decoder_init_norm": 0.5,
    }
    if architecture in ARCHITECTURES:
        settings["num_experts"] = 4
    return TrainingSAEConfig.from_dict({**settings, **overrides})


def runner_config(
    sae: TrainingSAEConfig, output: Path | None, **overrides: Any
) -> LanguageModelSAERunnerConfig[Any]:
    """60 steps of 256 tokens; latents are dead after 5 steps without firing."""
    settings: dict[str, Any] = {
        "model_name": "tiny",
        "hook_name": HOOK,
        "is_dataset_tokenized": False,
        "context_size": 32,
        "training_tokens": 60 * 256,
        "train_batch_size_tokens": 256,
        "store_batch_size_prompts": 16,
        "n_batches_in_buffer": 32,
        "n_batches_for_norm_estimate": 4,
        "lr": 5e-3,
        "dead_feature_window": 5,
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": None,
        "output_path": None if output is None else str(output),
        "verbose": False,
    }
    return LanguageModelSAERunnerConfig(sae=sae, **{**settings, **overrides})


# One batch of the language model is one training batch, so that nothing is left over in
# a buffer, which SAELens does not save. 16 steps.
IN_STEP: dict[str, Any] = {
    "context_size": 32,
    "store_batch_size_prompts": 8,
    "train_batch_size_tokens": 256,
    "n_batches_in_buffer": 8,
    "activations_mixing_fraction": 0.0,
    "training_tokens": 16 * 256,
    "n_batches_for_norm_estimate": 3,
    "lr": 5e-3,
    "lr_warm_up_steps": 3,
    "lr_decay_steps": 6,
    "dead_feature_window": 0,
}


def multi_runner(
    model: str, tokens: str, checkpoints: str | None, resume: str | None = None
) -> MultiSAETrainingRunner:
    """
    Both architectures on a Llama, in step; also for a process of its own.

    Args:
        model: Folder of the model.
        tokens: Folder of a data set with rows of 32 tokens.
        checkpoints: Folder for a checkpoint after half of the steps, if any.
        resume: Folder of a checkpoint to start from, if any.
    """
    torch.manual_seed(0)
    return MultiSAETrainingRunner(
        MultiSAETrainingRunnerConfig(
            saes={
                architecture: sae_config(
                    architecture, normalize_activations="expected_average_only_in"
                )
                for architecture in ARCHITECTURES
            },
            hook_names="model.layers.0",
            model_name=model,
            model_class_name="AutoModelForCausalLM",
            **IN_STEP,
            logger=LoggingConfig(log_to_wandb=False),
            n_checkpoints=0 if checkpoints is None else 1,
            checkpoint_path=checkpoints,
            resume_from_checkpoint=resume,
            output_path=None,
        ),
        override_dataset=Dataset.load_from_disk(tokens),
    )


def weights(sae: SAE[Any]) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: p.detach().clone() for name, p in sae.named_parameters()}


def assert_same_weights(
    actual: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    atol: float = 0.0,
) -> None:
    """Equal in every bit, unless ``atol`` allows for less."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, atol=atol, rtol=0, msg=lambda m: f"{name}: {m}"
        )

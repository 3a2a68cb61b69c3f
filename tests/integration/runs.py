"""Small SAEs, small runs of SAELens's runners, and what they leave on disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import small_corpus
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)
from sae_lens.multi_sae_training_runner import (
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.saes.sae import SAE, TrainingSAE, TrainingSAEConfig

import sae_lens_scale  # noqa: F401  (makes the architectures known)

ARCHITECTURES = ["scale", "switch"]
both_architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
HOOK = "blocks.0.hook_resid_post"
# The norm is estimated before training and folded into the weights after it.
NORMALIZED = {"normalize_activations": "expected_average_only_in"}


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
        settings |= {
            "num_experts": 4,
            "normalize_activations": "none",
            "aux_loss_coefficient": 1 / 32,
            "multi_topk_coefficient": 0.0,
        }
        of_one: dict[str, Any] = {"gate": "softmax"}
        of_more: dict[str, Any] = {"experts_per_token": 2, "num_shared_experts": 0}
        settings |= of_more if architecture == "scale" else of_one
    return TrainingSAEConfig.from_dict({**settings, **overrides})


def new_sae(
    architecture: str,
    hook: str = HOOK,
    hook_head_index: int | None = None,
    **overrides: Any,
) -> TrainingSAE[Any]:
    """An untrained SAE of 64 latents for contexts of 16 tokens at a hook."""
    metadata = {
        "hook_name": hook,
        "hook_head_index": hook_head_index,
        "context_size": 16,
        "prepend_bos": True,
        "model_from_pretrained_kwargs": {},
    }
    settings = {"d_sae": 64, "decoder_init_norm": 1.0, "metadata": metadata}
    torch.manual_seed(0)
    cfg = sae_config(architecture, **{**settings, **overrides})
    return TrainingSAE.from_dict(cfg.to_dict())


def exported(sae: TrainingSAE[Any], folder: Path, **kwargs: Any) -> SAE[Any]:
    """The SAE's export for inference, loaded."""
    sae.save_inference_model(folder)
    return SAE.load_from_disk(folder, **kwargs)


# 60 steps of 256 tokens; latents are dead after 5 steps without firing.
SHORT: dict[str, Any] = {
    "model_name": "tiny",
    "context_size": 32,
    "training_tokens": 60 * 256,
    "train_batch_size_tokens": 256,
    "store_batch_size_prompts": 16,
    "n_batches_in_buffer": 32,
    "n_batches_for_norm_estimate": 4,
    "lr": 5e-3,
    "dead_feature_window": 5,
    "checkpoint_path": None,
}
# One batch of the language model is one training batch, so that nothing is left over in
# a buffer, which SAELens does not save. 16 steps.
IN_STEP: dict[str, Any] = {
    **SHORT,
    "training_tokens": 16 * 256,
    "store_batch_size_prompts": 8,
    "n_batches_in_buffer": 8,
    "n_batches_for_norm_estimate": 3,
    "activations_mixing_fraction": 0.0,
    "lr_warm_up_steps": 3,
    "lr_decay_steps": 6,
    "dead_feature_window": 0,
}
# Nor in the first batches, which the SAE does not save.
WITHOUT_START = {"initialize_from_activations": False}


def no_wandb() -> LoggingConfig:
    return LoggingConfig(log_to_wandb=False)


def runner_config(
    sae: TrainingSAEConfig, output: Path | None = None, **overrides: Any
) -> LanguageModelSAERunnerConfig[Any]:
    """Config of a short run on the residual stream after the first block."""
    settings: dict[str, Any] = {
        **SHORT,
        "hook_name": HOOK,
        "is_dataset_tokenized": False,
        "logger": no_wandb(),
        "output_path": None if output is None else str(output),
        "verbose": False,
    }
    return LanguageModelSAERunnerConfig(sae=sae, **{**settings, **overrides})


def make_runner(
    cfg: LanguageModelSAERunnerConfig[Any],
    model: Any,
    dataset: Dataset | None = None,
    override_sae: TrainingSAE[Any] | None = None,
    runner_class: type[LanguageModelSAETrainingRunner] = LanguageModelSAETrainingRunner,
) -> LanguageModelSAETrainingRunner:
    """A runner on a model at hand and, unless told otherwise, the small corpus; seeded."""
    torch.manual_seed(0)
    return runner_class(
        cfg,
        override_dataset=small_corpus() if dataset is None else dataset,
        override_model=model,
        override_sae=override_sae,
    )


@dataclass
class TrainingRun:
    """
    A finished run of SAELens's runner on the tiny model.

    Attributes:
        sae: The SAE that the runner returned.
        cfg: The runner's config.
        output: Folder of the inference export.
        half_way: Folder of a checkpoint before the activation norm was folded.
        final: Folder of the checkpoint after that.
    """

    sae: TrainingSAE[Any]
    cfg: LanguageModelSAERunnerConfig[Any]
    output: Path
    half_way: Path
    final: Path


def train_tiny_sae(architecture: str, model: Any, folder: Path) -> TrainingRun:
    """Train briefly and leave everything in ``folder``."""
    # Not the defaults, so that losing them is noticed.
    unusual = {"load_balance_coefficient": 0.05, "decoder_init_norm": 0.2}
    cfg = runner_config(
        sae_config(architecture, **NORMALIZED, **unusual),
        folder / "output",
        training_tokens=4_096,
        # In the order of the text, so that another run sees the same batches.
        activations_mixing_fraction=0.0,
        n_checkpoints=1,
        save_final_checkpoint=True,
        checkpoint_path=str(folder / "checkpoints"),
    )
    sae = make_runner(cfg, model).run()
    (final,) = Path(str(cfg.checkpoint_path)).glob("final_*")
    (half_way,) = set(final.parent.iterdir()) - {final}
    return TrainingRun(sae, cfg, folder / "output", half_way, final)


def weights(sae: SAE[Any]) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: p.detach().clone() for name, p in sae.named_parameters()}


def assert_same_weights(
    actual: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    atol: float = 0.0,
) -> None:
    """Equal in every bit, unless ``atol`` allows for less."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@torch.no_grad()
def assert_computes_the_same(
    actual: SAE[Any],
    expected: SAE[Any],
    x: torch.Tensor,
    atol: float = 1e-4,
    rtol: float = 1e-4,
) -> None:
    """Feature activations and reconstructions of ``x``, up to rounding."""
    acts = expected.encode(x)
    assert acts.any()
    torch.testing.assert_close(actual.encode(x), acts, atol=atol, rtol=rtol)
    torch.testing.assert_close(actual(x), expected(x), atol=atol, rtol=rtol)


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
    cfg = MultiSAETrainingRunnerConfig(
        saes={
            name: sae_config(name, **NORMALIZED, **WITHOUT_START)
            for name in ARCHITECTURES
        },
        hook_names="model.layers.0",
        model_class_name="AutoModelForCausalLM",
        **{**IN_STEP, "model_name": model, "checkpoint_path": checkpoints},
        logger=no_wandb(),
        n_checkpoints=0 if checkpoints is None else 1,
        resume_from_checkpoint=resume,
        output_path=None,
    )
    return MultiSAETrainingRunner(cfg, override_dataset=Dataset.load_from_disk(tokens))

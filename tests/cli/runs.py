"""Command line of a small training run, and running one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# The fixture "run": of a command and the exit status to expect, by default 0. The result
# has what was printed: out and err.
Run = Callable[..., Any]

# For tests of what is the same for all architectures.
one_architecture = pytest.mark.parametrize("trained", ["scale"], indirect=True)


def train_command(
    architecture: str, model: Path, text: Path, output: Path, tokens: int = 12_288
) -> str:
    experts = "--experts_per_token 2 " if architecture == "scale" else ""
    return (
        f"train --architecture {architecture} --d_in 32 --d_sae 128 --num_experts 4 --k 8 {experts}"
        "--normalize_activations expected_average_only_in "
        f"--model_class_name AutoModelForCausalLM --model_name {model} "
        f"--hook_name model.layers.0 --dataset_path {text} --is_dataset_tokenized false "
        "--context_size 32 --store_batch_size_prompts 8 --train_batch_size_tokens 256 "
        "--n_batches_in_buffer 32 --n_batches_for_norm_estimate 2 --lr 2e-3 "
        f"--training_tokens {tokens} --n_checkpoints 1 --exclude_special_tokens true "
        f"--checkpoint_path {output / 'checkpoints'} --output_path {output / 'sae'} "
        "--log_to_wandb false --lr_factors b_enc=0 W_router=0.5"
    )


def checkpoint_of(trained: Path) -> Path:
    return next(trained.glob("checkpoints/*/*"))

"""Command line of a small training run."""

from pathlib import Path

SAE_OPTIONS = (
    "--d_in 32 --d_sae 128 --num_experts 4 --k 8 "
    "--normalize_activations expected_average_only_in"
)


def train_command(
    architecture: str, model: Path, text: Path, output: Path, tokens: int = 12_288
) -> list[str]:
    command = (
        f"train --architecture {architecture} {SAE_OPTIONS} "
        f"--model_class_name AutoModelForCausalLM --model_name {model} "
        f"--hook_name model.layers.0 --dataset_path {text} --is_dataset_tokenized false "
        "--context_size 32 --store_batch_size_prompts 8 --train_batch_size_tokens 256 "
        "--n_batches_in_buffer 32 --n_batches_for_norm_estimate 2 --lr 2e-3 "
        f"--training_tokens {tokens} --n_checkpoints 1 --exclude_special_tokens true "
        f"--checkpoint_path {output / 'checkpoints'} --output_path {output / 'sae'} "
        "--log_to_wandb false --lr_factors b_router=0 W_router=0.5"
    )
    return command.split()


def checkpoint_of(trained: Path) -> Path:
    return next(trained.glob("checkpoints/*/*"))

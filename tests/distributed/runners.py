"""Runners that tests give to groups of processes."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from cache.runs import cached_config
from datasets import Dataset
from distributed.work import mesh_of
from integration.runs import NORMALIZED, WITHOUT_START
from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.constants import SAE_WEIGHTS_FILENAME

from sae_lens_scale import ScaleTrainingSAEConfig
from sae_lens_scale.distributed.data_parallel import DataParallelSAE
from sae_lens_scale.distributed.runner import (
    DistributedTrainingRunner,
    share_checkpoints,
)
from sae_lens_scale.distributed.sae import distribute
from sae_lens_scale.runner import handling_signals


def make_runner(
    model: Path | str,
    text: Any,
    expert_parallel: int = 1,
    sae: Any = None,
    **overrides: Any,
) -> DistributedTrainingRunner:
    """
    A runner of a small run.

    Args:
        model: Folder of the language model.
        text: The text.
        expert_parallel: Processes that share out the experts.
        sae: Config of the SAE, or fields of a Scale SAE's.
        overrides: Fields of the run's config.
    """
    settings: dict[str, Any] = {
        "model_class_name": "AutoModelForCausalLM",
        "model_name": str(model),
        "hook_name": "model.layers.0",
        "context_size": 16,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 16,
        "train_batch_size_tokens": 64,
        "training_tokens": 640,
        "n_checkpoints": 0,
        "checkpoint_path": None,
        "output_path": None,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    if sae is None or isinstance(sae, dict):
        sizes: dict[str, Any] = {"d_in": 32, "d_sae": 128, "num_experts": 4, "k": 8}
        sizes |= {"experts_per_token": 2, **(sae or {})}
        sae = ScaleTrainingSAEConfig(**sizes)
    cfg = LanguageModelSAERunnerConfig(sae=sae, **(settings | overrides))
    return DistributedTrainingRunner(
        cfg, override_dataset=text, expert_parallel=expert_parallel
    )


def evaluations(model: Path, expert_parallel: int) -> list[dict[str, Any]]:
    """Metrics of the evaluations of a run, by topic, as this process logs them."""
    os.environ["WANDB_MODE"] = "disabled"
    found = []

    def evaluate(*arguments: Any) -> dict[str, Any]:
        metrics = DistributedTrainingRunner._evaluate(runner, *arguments)
        # SAELens adds histograms.
        found.append(dict(metrics))
        return metrics

    logger = LoggingConfig(
        log_to_wandb=True, wandb_log_frequency=1, eval_every_n_wandb_logs=4
    )
    text = Dataset.from_dict({"text": [f"{i} " * 30 for i in range(400)]})
    runner = make_runner(
        model,
        text,
        expert_parallel,
        logger=logger,
        n_batches_for_norm_estimate=2,
        eval_batch_size_prompts=2,
        n_eval_batches=2,
    )
    with patch.object(runner, "_evaluate", evaluate):
        runner.run()
    return found


def start_of_run(
    model: Path, expert_parallel: int
) -> list[dict[str, torch.Tensor] | None]:
    """
    Make a runner, and share out its SAE.

    Returns:
        Weights that this process made, and those of the whole SAE; None if it has none.
    """
    text = Dataset.from_dict({"text": [f"{i} " * 30 for i in range(40)]})
    sae: Any = make_runner(model, text, expert_parallel).sae
    weights = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    made = None if sae.W_dec.is_meta else weights
    whole = distribute(sae, mesh_of(expert_parallel)).whole()
    return [made, None if whole is None else whole.state_dict()]


def interrupted_at_the_end(model: Path, output: Path) -> list[bool]:
    """
    Train, with a signal to the last process while the SAE is gathered.

    Returns:
        For each signal that took effect here, whether the SAE had been saved before.
    """
    text = Dataset.from_dict({"text": [f"{i} " * 30 for i in range(40)]})
    settings = {"training_tokens": 64, "n_batches_for_norm_estimate": 1}
    runner = make_runner(model, text, 2, output_path=str(output), **settings)
    whole, found = DataParallelSAE.whole, []

    def interrupted(sae: DataParallelSAE, *arguments: Any) -> Any:
        if sae.mesh.world.rank == sae.mesh.world.size - 1:
            signal.raise_signal(signal.SIGTERM)
        return whole(sae, *arguments)

    def note(*_: Any) -> None:
        found.append((output / SAE_WEIGHTS_FILENAME).exists())

    with handling_signals(note), patch.object(DataParallelSAE, "whole", interrupted):
        runner.run()
    return found


def rows_to_read(
    model: Path, texts: list[str | None], streaming: bool
) -> tuple[list[str], int]:
    """Texts that this process reads, and the tokens that it gives to a batch."""
    text = Dataset.from_dict({"text": texts})
    runner = make_runner(model, text.to_iterable_dataset() if streaming else text)
    store = runner.activations_store
    rows: Any = store.dataset
    return [row["text"] for row in rows], store.train_batch_size_tokens


def shared_checkpoints(
    folder: Path,
    run_id: str,
    max_restarts: int,
    restarts: Sequence[int],
    resume: str | None = None,
) -> tuple[str, str | None]:
    """Folder of checkpoints and the one to go on from, after each process's restarts."""
    world = mesh_of(1).world
    cfg: Any = SimpleNamespace(
        checkpoint_path=str(folder / str(world.rank)), resume_from_checkpoint=resume
    )
    environment = {
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_MAX_RESTARTS": str(max_restarts),
        "TORCHELASTIC_RESTART_COUNT": str(restarts[world.rank]),
    }
    os.environ |= environment
    try:
        share_checkpoints(cfg, world)
    finally:
        for name in environment:
            del os.environ[name]
    return cfg.checkpoint_path, cfg.resume_from_checkpoint


def train_on_cache(
    folder: Path, expert_parallel: int, **overrides: Any
) -> dict[str, torch.Tensor] | None:
    """Weights after 20 steps on a cache, on the first process."""
    torch.manual_seed(0)
    cfg = cached_config(
        folder,
        sae={**NORMALIZED, **WITHOUT_START},
        training_tokens=20 * 250,
        # None of the processes' shares of it are equal.
        train_batch_size_tokens=250,
        **overrides,
    )
    sae = DistributedTrainingRunner(cfg, expert_parallel=expert_parallel).run()
    return None if sae is None else sae.state_dict()

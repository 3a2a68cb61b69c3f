"""A small run of SAELens's runner, for what comes after a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers import small_corpus
from integration.runs import runner_config, sae_config
from sae_lens import (
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
)
from sae_lens.saes.sae import TrainingSAE


@dataclass
class TrainingRun:
    """
    A finished run of SAELens's runner on the tiny model.

    Attributes:
        sae: What the runner returned.
        cfg: What it was given.
        output: Folder of the inference export.
        half_way: Folder of a checkpoint before the activation norm was folded.
        final: Folder of the checkpoint after that.
    """

    sae: TrainingSAE[Any]
    cfg: LanguageModelSAERunnerConfig[Any]
    output: Path
    half_way: Path
    final: Path


def train_tiny_sae(
    architecture: str, model: HookedSAETransformer, folder: Path
) -> TrainingRun:
    """Train briefly and leave everything in ``folder``."""
    # Not the defaults, so that losing them is noticed.
    unusual = {"load_balance_coefficient": 0.05, "decoder_init_norm": 0.2}
    cfg = runner_config(
        sae_config(
            architecture, normalize_activations="expected_average_only_in", **unusual
        ),
        folder / "output",
        training_tokens=4_096,
        # In the order of the text, so that another run sees the same batches.
        activations_mixing_fraction=0.0,
        n_checkpoints=1,
        save_final_checkpoint=True,
        checkpoint_path=str(folder / "checkpoints"),
    )
    torch.manual_seed(0)
    runner = LanguageModelSAETrainingRunner(
        cfg, override_dataset=small_corpus(), override_model=model
    )
    sae = runner.run()
    (final,) = Path(str(cfg.checkpoint_path)).glob("final_*")
    (half_way,) = set(final.parent.iterdir()) - {final}
    return TrainingRun(sae, cfg, folder / "output", half_way, final)

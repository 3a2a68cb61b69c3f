"""SAELens's training runner, with a checkpoint when it is interrupted."""

import signal
from pathlib import Path
from typing import Any

from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.sae_trainer import SAETrainer
from typing_extensions import override


class InterruptibleTrainingRunner(LanguageModelSAETrainingRunner):
    """
    A LanguageModelSAETrainingRunner that loses nothing when it is interrupted.

    SAELens 6.54 means to save a checkpoint on SIGINT and SIGTERM, but fails to, because
    nobody makes its folder, and would leave the weights out. This runner finishes the step,
    saves a checkpoint like any other (if ``checkpoint_path`` is set) and raises
    InterruptedException, whose text names it. Training goes on from there with
    ``resume_from_checkpoint``. A second signal stops at once, without a checkpoint.
    """

    _interrupted = False

    @override
    def run_trainer_with_interruption_handling(
        self, trainer: SAETrainer[Any, Any]
    ) -> Any:
        def interrupt(*_: Any) -> None:
            if self._interrupted or trainer.n_training_samples == 0:
                raise InterruptedException("no checkpoint was saved")
            self._interrupted = True
            # Due at the end of this step, when weights, optimizer and counters agree.
            trainer.checkpoint_thresholds.insert(0, -1)

        before = {
            s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            return trainer.fit()
        finally:
            for signal_number, handler in before.items():
                signal.signal(signal_number, handler)

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        super().save_checkpoint(checkpoint_path)
        if self._interrupted:
            raise InterruptedException(
                "no checkpoint was saved: checkpoint_path is not set"
                if checkpoint_path is None
                else f"resume_from_checkpoint {checkpoint_path} goes on from here"
            )

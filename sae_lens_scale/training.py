"""SAELens's training runner, with a checkpoint when it is interrupted, and faster."""

import signal
from pathlib import Path
from typing import Any

from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.sae_trainer import SAETrainer
from typing_extensions import override


class InterruptibleTrainingRunner(LanguageModelSAETrainingRunner):
    """
    A LanguageModelSAETrainingRunner that saves a checkpoint when it is interrupted.

    SAELens 6.54 means to save a checkpoint on SIGINT and SIGTERM, but fails to, because
    nobody makes its folder, and would leave the weights out. This runner finishes the step,
    saves a checkpoint like any other (if ``checkpoint_path`` is set) and raises
    InterruptedException, whose text names it. Training goes on from there with
    ``resume_from_checkpoint``. A signal before the first step, or a second one, stops at
    once, without a checkpoint. Handlers are installed during the run, which therefore needs
    the main thread, as SAELens's does.

    Args:
        *args: As SAELens's runner takes them.
        fused_optimizer: Whether Adam updates all of a parameter's state in one pass over
            memory, as torch's does with ``fused=True``: several times faster, equal up to
            rounding. A run that goes on from a checkpoint may choose anew.
        **kwargs: As SAELens's runner takes them.
    """

    _interrupted = False

    def __init__(self, *args: Any, fused_optimizer: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.fused_optimizer = fused_optimizer

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

        for group in trainer.optimizer.param_groups:
            # None is torch's default; False would also refuse its second best.
            group["fused"] = self.fused_optimizer or None
        # Nothing of an interrupted run before this one.
        self._interrupted = False
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
        # Once training is over there is nothing to resume: the run ends as usual.
        is_final = checkpoint_path is not None and checkpoint_path.name.startswith(
            "final_"
        )
        if self._interrupted and not is_final:
            raise InterruptedException(
                "no checkpoint was saved: checkpoint_path is not set"
                if checkpoint_path is None
                else f"resume_from_checkpoint {checkpoint_path} goes on from here"
            )

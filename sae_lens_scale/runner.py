"""
Training runner: SAELens's, with a checkpoint when it is interrupted, learning rates for
single parameters, and a fused optimizer.
"""

import json
import math
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import HfDataset, LanguageModelSAERunnerConfig
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from typing_extensions import override

from sae_lens_scale.files import write_whole
from sae_lens_scale.loading.errors import naming_model, naming_text
from sae_lens_scale.upstream import InterruptedException

LR_FACTORS_FILENAME = "lr_factors.json"


def require_lr_factors(sae: TrainingSAE[Any], lr_factors: Mapping[str, float]) -> None:
    """
    Refuse factors, by name of the parameter, that cannot multiply learning rates.

    Raises:
        ValueError: If the SAE has no parameter of a name, or a factor is no finite number
            of at least 0.
    """
    names = [name for name, _ in sae.named_parameters()]
    unknown = sorted(set(lr_factors) - set(names))
    if unknown:
        raise ValueError(
            f"lr_factors must name parameters of the SAE ({', '.join(names)}), got "
            f"{unknown}"
        )
    for name, factor in lr_factors.items():
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(
                f"lr_factors[{name!r}] must be a finite number of at least 0, got "
                f"{factor!r}"
            )


def apply_lr_factors(
    optimizer: torch.optim.Optimizer,
    sae: TrainingSAE[Any],
    lr_factors: Mapping[str, float],
) -> None:
    """
    Multiply the learning rates of single parameters, from now on.

    Each later step of the optimizer changes these parameters by a multiple of the change
    without factors, which is the same thing for Adam, whose steps are proportional to the
    learning rate. Its state, SAELens's schedule and checkpoints stay as they are.

    Args:
        optimizer: The optimizer of the SAE's parameters.
        sae: The SAE.
        lr_factors: Factors, by name of the parameter; 0 keeps a parameter as it is.

    Raises:
        ValueError: As :func:`require_lr_factors`.
    """
    require_lr_factors(sae, lr_factors)
    parameters = dict(sae.named_parameters())
    before: dict[str, torch.Tensor] = {}

    def remember(*_: Any) -> None:
        before.update({name: parameters[name].detach().clone() for name in lr_factors})

    @torch.no_grad()
    def rescale(*_: Any) -> None:
        for name, factor in lr_factors.items():
            parameters[name].copy_(before.pop(name).lerp(parameters[name], factor))

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(rescale)


class InterruptibleTrainingRunner(LanguageModelSAETrainingRunner):
    """
    LanguageModelSAETrainingRunner that saves a checkpoint when it is interrupted.

    SAELens 6.54 tries to save a checkpoint on SIGINT and SIGTERM, but fails, because its
    folder is never made, and would leave the weights out. This runner finishes the step,
    saves a checkpoint like any other (if ``checkpoint_path`` is set) and raises
    InterruptedException, whose text names it. Training goes on from there with
    ``resume_from_checkpoint``. A signal before the first step, or a second one, stops at
    once, without a checkpoint. Handlers are installed during the run, which therefore needs
    the main thread, as SAELens's does.

    Args:
        cfg: Config of the run.
        override_dataset: The text, instead of the config's.
        *args: Further arguments of SAELens's runner.
        fused_optimizer: Let Adam update all of a parameter's state in one pass over memory
            (torch's ``fused=True``): several times faster, equal up to rounding. A run that
            goes on from a checkpoint may choose anew.
        lr_factors: Factors on the learning rates of some parameters, such as
            ``{"b_enc": 0.5}``; those of ``W_router`` and ``b_router`` multiply the config's
            ``router_lr_factor``. They are in the runner's checkpoints: a run that goes on
            from one has them unless it is given others.
        **kwargs: Further arguments of SAELens's runner.

    Raises:
        ValueError: If the model or the text cannot be loaded, and as
            :func:`require_lr_factors`.
    """

    _interrupted = False

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        override_dataset: HfDataset | None = None,
        *args: Any,
        fused_optimizer: bool = False,
        lr_factors: Mapping[str, float] | None = None,
        **kwargs: Any,
    ):
        try:
            super().__init__(cfg, override_dataset, *args, **kwargs)
        except Exception:
            # SAELens sets cfg, then loads the model unless it is given one, then the text,
            # and its errors name neither.
            if not hasattr(self, "cfg"):
                raise
            if not hasattr(self, "model"):
                with naming_model("model_name", cfg.model_name):
                    raise
            if not hasattr(self, "activations_store") and override_dataset is None:
                with naming_text("dataset_path", cfg.dataset_path):
                    raise
            raise
        self.fused_optimizer = fused_optimizer
        if lr_factors is None and self.cfg.resume_from_checkpoint is not None:
            saved = Path(self.cfg.resume_from_checkpoint, LR_FACTORS_FILENAME)
            # Checkpoints of SAELens's own runner have none.
            lr_factors = json.loads(saved.read_text()) if saved.exists() else None
        require_lr_factors(self.sae, lr_factors or {})
        self.lr_factors = {n: float(f) for n, f in (lr_factors or {}).items()}

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
            # None is torch's default; False would also refuse its foreach implementation.
            group["fused"] = self.fused_optimizer or None
        apply_lr_factors(trainer.optimizer, self.sae, self.lr_factors)
        # An earlier run of this runner may have been interrupted.
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
        message = "no checkpoint was saved: checkpoint_path is not set"
        if checkpoint_path is not None:
            factors = json.dumps(self.lr_factors)
            write_whole(checkpoint_path / LR_FACTORS_FILENAME, factors)
            message = f"resume_from_checkpoint {checkpoint_path} goes on from here"
        # Once training is over there is nothing to resume: the run ends as usual.
        is_final = checkpoint_path and checkpoint_path.name.startswith("final_")
        if self._interrupted and not is_final:
            raise InterruptedException(message)

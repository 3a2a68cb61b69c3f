"""
Training runner: SAELens's, with a checkpoint when it is interrupted, learning rates for
single parameters, and a fused optimizer.
"""

import json
import math
import signal
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import HfDataset, LanguageModelSAERunnerConfig
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.util import str_to_dtype
from transformer_lens.hook_points import HookedRootModule
from typing_extensions import override

from sae_lens_scale.files import read_json, require_writable, write_whole
from sae_lens_scale.loading.errors import (
    first_prompt,
    naming_model,
    naming_text,
    require_context,
    require_device,
    require_hook,
)
from sae_lens_scale.loading.text import skip_missing_texts
from sae_lens_scale.upstream import InterruptedException, buffer_argument

LR_FACTORS_FILENAME = "lr_factors.json"

# Settings of a run that the state of its trainer and optimizer, in a checkpoint, decides: other
# values of the config would be ignored. Those of the run's length count if the learning rate
# depends on it.
_SCHEDULE = (
    "lr",
    "lr_scheduler_name",
    "lr_warm_up_steps",
    "lr_decay_steps",
    "lr_end",
    "n_restart_cycles",
    "adam_beta1",
    "adam_beta2",
)
_LENGTH = ("training_tokens", "train_batch_size_tokens")
# Fields of the SAE's config that its weights, and the scale of activations that they expect,
# decide. After its end a run has folded that scale in.
_WEIGHTS = ("architecture", "d_in", "d_sae", "num_experts", "normalize_activations")
# Normalisations that SAELens estimates before the first step.
_ESTIMATED = ("expected_average_only_in", "covariance_whitening")


def require_lr_factors(sae: TrainingSAE[Any], lr_factors: Mapping[str, float]) -> None:
    """
    Refuse factors, by name of the parameter, that cannot multiply learning rates.

    Raises:
        ValueError: If the SAE has no parameter of a name, or a factor is no finite number
            of at least 0.
    """
    _require_factors(lr_factors)
    names = [name for name, _ in sae.named_parameters()]
    unknown = sorted(set(lr_factors) - set(names))
    if unknown:
        raise ValueError(
            f"lr_factors must name parameters of the SAE ({', '.join(names)}), got "
            f"{unknown}"
        )


def _require_factors(lr_factors: Any) -> None:
    if not isinstance(lr_factors, Mapping):
        raise ValueError(
            f"lr_factors must be factors by name of the parameter, got {lr_factors!r}"
        )
    for name, factor in lr_factors.items():
        if not (isinstance(factor, Real) and 0 <= float(factor) < math.inf):
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

    Settings that cannot work are refused before anything is loaded, and those that do not
    suit the model or the text before the first step. A run that goes on from a checkpoint
    goes on with its optimizer and its schedule of the learning rate, so that its config must
    name the same; a schedule that ends needs the same ``training_tokens``.

    Args:
        cfg: Config of the run.
        override_dataset: The text, instead of the config's.
        override_model: The language model, instead of the config's.
        override_sae: The SAE to train, instead of a new one, or of the one in
            ``from_pretrained_path``. Of both, and not of ``cfg.sae``, is all of the SAE's
            own config.
        fused_optimizer: Let Adam update all of a parameter's state in one pass over memory
            (torch's ``fused=True``): several times faster, equal up to rounding. A run that
            goes on from a checkpoint may choose anew.
        lr_factors: Factors on the learning rates of some parameters, such as
            ``{"b_enc": 0.5}``; those of ``W_router`` and ``b_router`` multiply the config's
            ``router_lr_factor``. They are in the runner's checkpoints: a run that goes on
            from one has them unless it is given others.

    Raises:
        ValueError: If a setting is wrong, also beside the checkpoint's; if the model or the
            text cannot be loaded; and as :func:`require_lr_factors`.
        OSError: If a folder to write into is none, or a checkpoint lacks a file.
    """

    _interrupted = False

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        override_dataset: HfDataset | None = None,
        override_model: HookedRootModule | None = None,
        override_sae: TrainingSAE[Any] | None = None,
        *,
        fused_optimizer: bool = False,
        lr_factors: Mapping[str, float] | None = None,
    ):
        checkpoint = cfg.resume_from_checkpoint
        if lr_factors is None and checkpoint is not None:
            saved = Path(checkpoint, LR_FACTORS_FILENAME)
            # Checkpoints of SAELens's own runner have none.
            lr_factors = read_json(saved) if saved.exists() else None
        lr_factors = {} if lr_factors is None else lr_factors
        _require_factors(lr_factors)
        # SAELens would take dataset_path instead.
        if override_dataset is not None and not override_dataset:
            raise ValueError("override_dataset must not be empty")
        _require_settings(cfg)
        # These would be ignored where the runner is given what they are for.
        if override_model is None:
            require_device("llm_device", str(cfg.llm_device))
        if override_sae is None and cfg.from_pretrained_path is not None:
            file = Path(cfg.from_pretrained_path, SAE_CFG_FILENAME)
            if not file.is_file():
                raise FileNotFoundError(f"from_pretrained_path: there is no {file}")
        if checkpoint is not None:
            _require_same(Path(checkpoint), RUNNER_CFG_FILENAME, _schedule_of(cfg))
        try:
            super().__init__(cfg, override_dataset, override_model, override_sae)
        except Exception as error:
            # SAELens sets cfg, then loads the model unless it is given one, then the text,
            # and its errors name neither.
            if not hasattr(self, "cfg"):
                raise
            if not hasattr(self, "model"):
                with naming_model("model_name", cfg.model_name):
                    raise
            reads_text = override_dataset is None and not cfg.use_cached_activations
            if not hasattr(self, "activations_store") and reads_text:
                with naming_text("dataset_path", cfg.dataset_path):
                    raise
            if isinstance(error, StopIteration):
                raise ValueError("override_dataset must not be empty") from error
            raise
        if checkpoint is not None:
            # Of the SAE that goes on, which may be none of the config.
            weights = self.sae.cfg.to_dict()
            weights = {name: weights[name] for name in _WEIGHTS if name in weights}
            _require_same(Path(checkpoint), SAE_CFG_FILENAME, weights)
        self.fused_optimizer = fused_optimizer
        require_lr_factors(self.sae, lr_factors)
        self.lr_factors = {n: float(f) for n, f in lr_factors.items()}
        # The model is not run if activations are cached.
        if not cfg.use_cached_activations:
            self._require_activations(override_dataset is None)

    def _require_activations(self, dataset_is_named: bool) -> None:
        """Refuse a text without a prompt, and a model without the SAE's activations."""
        cfg = self.cfg
        require_context("context_size", cfg.context_size, self.model)
        named = f"dataset_path {cfg.dataset_path}"
        text = named if dataset_is_named else "override_dataset"
        skip_missing_texts(self.activations_store)
        tokens = first_prompt(text, self.activations_store)
        # A first run of another shape would be compiled.
        if not cfg.compile_llm:
            hook = (cfg.hook_name, cfg.hook_head_index, self.sae.cfg.d_in)
            arguments = (*hook, cfg.model_kwargs)
            require_hook(self.model, cfg.model_name, tokens, *arguments)

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


def _require_settings(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Refuse settings of a run that would fail, or train nothing, once it has begun."""
    (buffer,) = buffer_argument(1)
    counts = {
        name: getattr(cfg, name)
        for name in (
            "training_tokens",
            "train_batch_size_tokens",
            "store_batch_size_prompts",
            buffer,
            "feature_sampling_window",
        )
    }
    if cfg.sae.normalize_activations in _ESTIMATED:
        counts["n_batches_for_norm_estimate"] = cfg.n_batches_for_norm_estimate
    if cfg.logger.log_to_wandb:
        for name in ("wandb_log_frequency", "eval_every_n_wandb_logs"):
            counts[name] = getattr(cfg.logger, name)
    for name, value in counts.items():
        if not (isinstance(value, Real) and float(value) >= 1):
            raise ValueError(f"{name} must be positive, got {value!r}")
    if cfg.context_size < 1 + cfg.prepend_bos:
        raise ValueError(
            f"context_size must be at least {1 + cfg.prepend_bos}, with "
            f"prepend_bos={cfg.prepend_bos}, got {cfg.context_size}"
        )
    used = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    if used * counts[buffer] < cfg.train_batch_size_tokens:
        raise ValueError(
            f"{buffer} must be so many contexts of {used} tokens that they hold "
            f"train_batch_size_tokens={cfg.train_batch_size_tokens}, got {counts[buffer]}"
        )
    if not 0 <= cfg.activations_mixing_fraction <= 1:
        raise ValueError(
            "activations_mixing_fraction must be from 0 to 1, got "
            f"{cfg.activations_mixing_fraction!r}"
        )
    _require_schedule(cfg)
    str_to_dtype(cfg.dtype)
    for name in ("device", "act_store_device"):
        require_device(name, getattr(cfg, name))
    for name in ("output_path", "checkpoint_path"):
        # SAELens would notice when it saves, at the end.
        if (folder := getattr(cfg, name)) is not None:
            require_writable(name, folder)
    if (
        cfg.use_cached_activations
        and not Path(str(cfg.cached_activations_path)).is_dir()
    ):
        raise NotADirectoryError(
            f"cached_activations_path: {cfg.cached_activations_path} is no folder"
        )


def _require_schedule(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    if not (isinstance(cfg.lr, Real) and 0 < cfg.lr < math.inf):
        raise ValueError(f"lr must be positive and finite, got {cfg.lr!r}")
    trainer_cfg = cfg.to_sae_trainer_config()
    try:
        # As SAELens's trainer, which is there only when all else is loaded.
        optimizer = torch.optim.Adam(
            [torch.zeros(1)], lr=cfg.lr, betas=(cfg.adam_beta1, cfg.adam_beta2)
        )
        get_lr_scheduler(
            cfg.lr_scheduler_name,
            optimizer,
            training_steps=trainer_cfg.total_training_steps,
            lr=cfg.lr,
            warm_up_steps=cfg.lr_warm_up_steps,
            decay_steps=cfg.lr_decay_steps,
            lr_end=trainer_cfg.lr_end or 0.0,
            num_cycles=cfg.n_restart_cycles,
        )
    except (ValueError, TypeError, ArithmeticError) as error:
        settings = ", ".join(f"{n}={getattr(cfg, n)!r}" for n in _SCHEDULE)
        raise ValueError(
            f"no schedule of the learning rate can be made of {settings}: {error}"
        ) from error


def _schedule_of(cfg: LanguageModelSAERunnerConfig[Any]) -> dict[str, Any]:
    """Settings that a checkpoint decides, but for those that the scheduler ignores."""
    scheduler = cfg.lr_scheduler_name.lower()
    names: list[str] = [*_SCHEDULE]
    if scheduler != "cosineannealingwarmrestarts":
        names.remove("n_restart_cycles")
    if scheduler == "constant":
        names.remove("lr_end")
    if scheduler != "constant" or cfg.lr_decay_steps:
        names += _LENGTH
    return {name: getattr(cfg, name) for name in names}


def _require_same(checkpoint: Path, filename: str, settings: dict[str, Any]) -> None:
    """Refuse settings other than those in a file of the checkpoint that a run goes on from."""
    path = checkpoint / filename
    if not path.is_file():
        raise FileNotFoundError(f"resume_from_checkpoint: there is no {path}")
    before = read_json(path)
    if not isinstance(before, dict):
        raise ValueError(f"{path} must hold settings, got {before!r}")
    for name, value in settings.items():
        # Of another version, it may lack one.
        if before.get(name, value) != value:
            raise ValueError(
                f"{name} must be {before[name]!r}, as in {checkpoint}, whose run "
                f"goes on, got {value!r}; from_pretrained_path begins another run "
                "from its weights"
            )

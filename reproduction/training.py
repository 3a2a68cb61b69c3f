"""Training of one SAE on cached activations, and its record."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAE, SAEMetadata, TrainingSAE, TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.training.types import DataProvider
from typing_extensions import override

from sae_lens_scale.files import dump_json, replacing_files
from sae_lens_scale.runner import apply_lr_factors
from sae_lens_scale.saes.mixture import MixtureTrainingSAE
from sae_lens_scale.saes.mixture.initialization import geometric_median

from .activations import ActivationCache, Activations
from .flops import flops_per_token
from .measures import (
    firing_counts,
    further_measures,
    reconstruction,
    reconstruction_error,
)
from .records import RunRecord, describe_environment
from .settings import RunSettings

_NORM_ESTIMATE_TOKENS = 100_000
_INITIALIZATION_TOKENS = 12_800
# Reading the loss waits for the GPU: it is checked once in so many steps.
_STEPS_BETWEEN_LOOKS = 100
# Shares of the training tokens after which the curve has a point: dense early on, where
# architectures that differ in speed meet, and enough points while the learning rate decays.
_CURVE = sorted(
    {round(0.01 * 10 ** (i / 8), 3) for i in range(17)} | {i / 20 for i in range(1, 21)}
)


class GridTrainer(SAETrainer[Any, Any]):
    """
    SAELens's trainer, with learning rates for single parameters and a stopwatch.

    Attributes:
        after_step: Called with the trainer after each step, in order. The stopwatch runs
            on, except for callers that stop it.
    """

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: TrainingSAE[Any],
        data_provider: DataProvider,
        lr_factors: dict[str, float],
    ):
        super().__init__(cfg, sae, data_provider)
        self.after_step: list[Callable[[GridTrainer], None]] = []
        self.stopwatch = Stopwatch(cfg.device)
        self._loss = torch.zeros(())
        apply_lr_factors(self.optimizer, sae, lr_factors)
        for group in self.optimizer.param_groups:
            group["fused"] = True

    @override
    def step(self, batch: torch.Tensor) -> TrainStepOutput:
        output = super().step(batch)
        self._loss = output.loss.detach()
        if self.n_training_steps % _STEPS_BETWEEN_LOOKS == 0:
            self._require_finite_loss()
        for call in self.after_step:
            call(self)
        return output

    @override
    def fit(self) -> TrainingSAE[Any]:
        trained = super().fit()
        self._require_finite_loss()
        return trained

    def _require_finite_loss(self) -> None:
        """Refuse a loss that is not finite: SAELens's SAEs do not, and go on with it."""
        if not self._loss.isfinite():
            raise ValueError(
                f"the loss is not finite at training step {self.n_training_steps}, got "
                f"{self._loss.item()}"
            )


class Stopwatch:
    """Wall and CPU seconds, while it runs."""

    def __init__(self, device: str = "cpu"):
        self._device = torch.device(device)
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self._since: tuple[float, float] | None = None

    def start(self) -> None:
        """Start counting."""
        self._synchronize()
        self._since = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Stop counting, until it is started again."""
        assert self._since is not None
        self._synchronize()
        self.seconds += time.perf_counter() - self._since[0]
        self.cpu_seconds += time.process_time() - self._since[1]
        self._since = None

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def train_run(
    settings: RunSettings,
    cache: ActivationCache,
    output: str | Path | None = None,
    *,
    device: str = "cpu",
    workers: int = 1,
    keep_weights: bool = False,
    measures: bool = True,
    customize: Callable[[GridTrainer, Activations], None] | None = None,
) -> RunRecord:
    """
    Train an SAE and measure it.

    Args:
        cache: The activations to train and to evaluate on.
        output: Folder of the records, in which a run that is recorded is not repeated;
            None keeps nothing.
        workers: Number of runs that share the machine, for the record.
        keep_weights: Leave the SAE, for inference, in a folder beside the record.
        measures: Measure more than the reconstruction.
        customize: Called with the trainer and the activations to train on before the first
            step, for variants that no setting makes: it may change the trainer, its SAE
            and its optimizer, and add to ``after_step``. Name them in ``settings.variant``.

    Raises:
        ValueError: If settings and activations do not fit, if the record in the folder is
            of another SAE, or if the loss is not finite.
    """
    finished = output and finished_record(settings, cache, output)
    if finished:
        return finished
    began = time.perf_counter()
    if torch.device(device).type != "cpu":
        cache = cache.to(device)
    # A seed decides the SAE, and the caller's randomness is left as it was.
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        trainer = _start(settings, cache, device)
        initialization = trainer.stopwatch.seconds
        curve: list[dict[str, float]] = []
        if settings.curve_tokens:
            held_out = Activations([cache.in_domain.sample(settings.curve_tokens)])
            curve = _draw_curve(trainer, settings, held_out)
        if customize is not None:
            customize(trainer, cache.train)
        trainer.stopwatch.start()
        trained = trainer.fit()
        trainer.stopwatch.stop()
    with TemporaryDirectory() as temporary:
        # The SAE is measured as users will load it.
        trained.save_inference_model(temporary)
        sae = SAE.load_from_disk(temporary, device=device)
        counts = firing_counts(sae, cache.in_domain)
        record = RunRecord(
            name=settings.name,
            label=settings.label,
            settings=asdict(settings),
            sae_cfg=_sae_cfg(settings, cache),
            cache=cache.describe(),
            environment=describe_environment(device, workers),
            seconds={
                "initialization": initialization,
                "training": trainer.stopwatch.seconds,
                "training_cpu": trainer.stopwatch.cpu_seconds,
            },
            curve=curve,
            in_domain=reconstruction(sae, cache.in_domain, counts),
            other_domain=None,
            dead=trainer.dead_neurons.double().mean().item(),
            measures={"flops_per_token": _flops(settings, sae)},
        )
        for name in ("other_domain", "unseen_text"):
            if (text := getattr(cache, name)) is not None:
                other = reconstruction(sae, text, firing_counts(sae, text))
                setattr(record, name, other)
        if measures:
            record.measures |= further_measures(sae, cache.in_domain, counts)
        record.seconds["total"] = time.perf_counter() - began
    if output is not None:
        if keep_weights:
            with replacing_files(Path(output, settings.name)) as folder:
                trained.save_inference_model(folder)
        record.write(output)
    return record


def _flops(settings: RunSettings, sae: SAE[Any]) -> dict[str, Any] | None:
    """Count those of a training step and of a reconstruction; None if there is no formula."""
    counted = {"training": settings.sae_config(sae.cfg.d_in), "inference": sae.cfg}
    try:
        return {name: asdict(flops_per_token(cfg)) for name, cfg in counted.items()}
    except ValueError:
        return None


def _sae_cfg(settings: RunSettings, cache: ActivationCache) -> dict[str, Any]:
    cfg = settings.sae_config(cache.train.d_in).to_dict()
    return {n: v for n, v in cfg.items() if n not in ("metadata", "device")}


def _start(settings: RunSettings, cache: ActivationCache, device: str) -> GridTrainer:
    """Put an initialised SAE into its trainer."""
    stopwatch = Stopwatch(device)
    stopwatch.start()
    cfg = settings.sae_config(cache.train.d_in, device)
    if cache.settings is not None:
        cfg.metadata = SAEMetadata(
            model_name=cache.settings.model,
            hook_name=cache.settings.hook_name,
            dataset_path=cache.settings.text,
            context_size=cache.settings.context_size,
            prepend_bos=True,
            exclude_special_tokens=True,
        )
    sae = TrainingSAE.from_dict(cfg.to_dict())
    scaler = ActivationScaler()
    if cfg.normalize_activations == "expected_average_only_in":
        x = cache.train.sample(_NORM_ESTIMATE_TOKENS, settings.seed)
        scaler.estimate_scaling_factor(cfg.d_in, iter([x]), 1)
    elif cfg.normalize_activations == "covariance_whitening":
        x = cache.train.sample(_NORM_ESTIMATE_TOKENS, settings.seed)
        scaler.estimate_whitening(cfg.d_in, iter([x]), 1)
    if settings.initialization == "activations":
        _initialize(settings, sae, cache.train, scaler)
    trainer_cfg = SAETrainerConfig(
        total_training_samples=settings.steps * settings.batch_size,
        train_batch_size_samples=settings.batch_size,
        lr=settings.lr,
        lr_end=settings.lr / 10 if settings.lr_end is None else settings.lr_end,
        lr_scheduler_name=settings.lr_scheduler_name,
        lr_warm_up_steps=round(settings.lr_warm_up_fraction * settings.steps),
        lr_decay_steps=round(settings.lr_decay_fraction * settings.steps),
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        device=device,
        autocast=settings.autocast,
        dead_feature_window=max(1, settings.dead_after_tokens // settings.batch_size),
        feature_sampling_window=settings.steps + 1,
        logger=LoggingConfig(log_to_wandb=False),
    )
    batches = cache.train.shuffled(settings.batch_size, settings.seed)
    trainer = GridTrainer(trainer_cfg, sae, batches, settings.lr_factors)
    trainer.activation_scaler = scaler
    trainer.stopwatch = stopwatch
    stopwatch.stop()
    return trainer


def _initialize(
    settings: RunSettings,
    sae: TrainingSAE[Any],
    train: Activations,
    scaler: ActivationScaler,
) -> None:
    num_experts = sae.cfg.num_experts if isinstance(sae, MixtureTrainingSAE) else 1
    x = train.sample(
        max(_INITIALIZATION_TOKENS, settings.tokens_per_expert * num_experts),
        settings.seed,
    )
    if isinstance(sae, MixtureTrainingSAE):
        sae.initialize_from_activations(x)
    else:
        x = sae.run_time_activation_norm_fn_in(scaler(x.to(sae.device)))
        sae.b_dec.data.copy_(geometric_median(x))


def _draw_curve(
    trainer: GridTrainer, settings: RunSettings, held_out: Activations
) -> list[dict[str, float]]:
    """Let training fill a list with the points of a learning curve."""
    due = {0, *(max(1, round(share * settings.steps)) for share in _CURVE)}
    curve: list[dict[str, float]] = []

    def add_point(trainer: GridTrainer) -> None:
        if trainer.n_training_samples // settings.batch_size not in due:
            return
        trainer.stopwatch.stop()
        error = reconstruction_error(
            trainer.sae, held_out, trainer.activation_scaler, settings.batch_size
        )
        curve.append(
            {
                "tokens": trainer.n_training_samples,
                "seconds": trainer.stopwatch.seconds,
                "cpu_seconds": trainer.stopwatch.cpu_seconds,
                **error,
            }
        )
        trainer.stopwatch.start()

    trainer.stopwatch.start()
    add_point(trainer)
    trainer.stopwatch.stop()
    trainer.after_step.append(add_point)
    return curve


def finished_record(
    settings: RunSettings, cache: ActivationCache, output: str | Path
) -> RunRecord | None:
    """
    Find the record of an earlier run, if there is one.

    Raises:
        ValueError: If its SAE or its activations differ from these, because defaults have
            changed, say. Settings that are newer than the record do not count.
    """
    path = Path(output, f"{settings.name}.json")
    if not path.exists():
        return None
    record = RunRecord.read(path)
    # The SAE is compared by its whole config: the fields that settings name may say the same
    # as defaults.
    changes = {n: v for n, v in asdict(settings).items() if n != "sae"}
    expected = json.loads(
        dump_json([changes, _sae_cfg(settings, cache), cache.describe()])
    )
    found = (record.settings, record.sae_cfg, record.cache)
    for now, then in zip(expected, found, strict=True):
        for name, value in (now or {}).items():
            old = (then or {}).get(name, value)
            if old != value:
                raise ValueError(
                    f"{path} was made with {name}={old!r}, now it would be {value!r}: "
                    "move it away, or use another folder"
                )
    return record

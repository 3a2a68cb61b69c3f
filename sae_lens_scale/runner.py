"""
Training runner: SAELens's, with a checkpoint when it is interrupted, learning rates for
single parameters, and a fused optimizer.
"""

import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict, IterableDatasetDict
from sae_lens.config import HfDataset, LanguageModelSAERunnerConfig
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens.hook_points import HookedRootModule
from typing_extensions import override

from sae_lens_scale.cache.manifest import reads_cache
from sae_lens_scale.cache.store import (
    CachedActivationsStore,
    NoModel,
    cached_batches,
    cached_tokens,
    no_text,
)
from sae_lens_scale.files import read_json, write_whole
from sae_lens_scale.loading.docstrings import docstring_corpus
from sae_lens_scale.loading.errors import (
    first_prompt,
    naming_model,
    naming_text,
    require_context,
    require_device,
    require_hook,
)
from sae_lens_scale.loading.smollm2 import is_smollm2, load_smollm2
from sae_lens_scale.loading.text import skip_missing_texts
from sae_lens_scale.run_settings import (
    require_checkpoint,
    require_sae_of_checkpoint,
    require_sae_of_folder,
    require_settings,
)
from sae_lens_scale.upstream import InterruptedException

LR_FACTORS_FILENAME = "lr_factors.json"


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
    suit the model or the text before the first step. The config's ``model_name`` may be
    "smollm2" (or, of a HookedTransformer, its name on the hub), and its ``dataset_path``
    "docstrings", which need no hub. A run that goes on from a checkpoint goes on with its
    optimizer and its schedule of the learning rate, so that its config must name the same;
    a schedule that ends needs the same ``training_tokens``.

    Of a cache that :func:`.cache_activations` wrote (``use_cached_activations`` with its folder)
    it reads each token once an epoch, mixed over all of them, and goes on from any checkpoint
    as if it had not been interrupted. The model and the text are then for the evaluations that
    Weights & Biases gets, and not loaded without it.

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
    # Processes that share out each batch.
    _num_processes = 1

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
        _require_override(override_dataset, override_sae, cfg.sae.d_in)
        require_settings(cfg, self._num_processes)
        # These would be ignored where the runner is given what they are for.
        if override_model is None:
            require_device("llm_device", str(cfg.llm_device))
        if override_sae is None and cfg.from_pretrained_path is not None:
            require_sae_of_folder(cfg, Path(cfg.from_pretrained_path))
        if checkpoint is not None:
            require_checkpoint(cfg, Path(checkpoint))
        live = self._to_load(cfg)
        is_cached = reads_cache(cfg)
        if is_cached:
            live.use_cached_activations = False
            if not cfg.logger.log_to_wandb:
                live.exclude_special_tokens = live.use_chat_formatting = False
                override_model = override_model or NoModel()
                override_dataset = override_dataset or no_text(cfg.context_size)
        named = (cfg.model_name, cfg.model_class_name)
        if override_model is None and is_smollm2(*named):
            override_model = load_smollm2(device=str(cfg.llm_device))
        if override_dataset is None and cfg.dataset_path == "docstrings":
            override_dataset = docstring_corpus("train")
        try:
            super().__init__(live, override_dataset, override_model, override_sae)
        except Exception as error:
            # SAELens sets cfg, then loads the model unless it is given one, then the text,
            # and its errors name neither.
            if not hasattr(self, "cfg"):
                raise
            if not hasattr(self, "model"):
                # Loaded with hooks on the modules of these names alone.
                if isinstance(error, ValueError) and "hook_names" in str(error):
                    raise ValueError(
                        f"hook_name must be a module of {cfg.model_name}, got "
                        f"{cfg.hook_name!r}"
                    ) from error
                with naming_model("model_name", cfg.model_name):
                    raise
            reads_text = override_dataset is None and not live.use_cached_activations
            if not hasattr(self, "activations_store") and reads_text:
                with naming_text("dataset_path", cfg.dataset_path):
                    raise
            if isinstance(error, StopIteration):
                raise ValueError("override_dataset must not be empty") from error
            raise
        self.cfg = cfg
        if checkpoint is not None:
            # Of the SAE that goes on, which may be none of the config.
            require_sae_of_checkpoint(self.sae.cfg, Path(checkpoint))
        self.fused_optimizer = fused_optimizer
        require_lr_factors(self.sae, lr_factors)
        self.lr_factors = {n: float(f) for n, f in lr_factors.items()}
        if is_cached:
            self.activations_store = self.evaluator.activations_store = (
                self._cached_store(live)
            )
        # Of cached activations the model is run in evaluations at most.
        if not cfg.use_cached_activations:
            self._require_activations(override_dataset is None)

    def _cached_store(
        self, live: LanguageModelSAERunnerConfig[Any]
    ) -> CachedActivationsStore:
        """Make a store that evaluates on the text, which is loaded, and trains on the cache."""
        store = CachedActivationsStore.from_config(
            self.model, live, override_dataset=self.activations_store.dataset
        )
        assert isinstance(store, CachedActivationsStore)
        store.tokens = cached_tokens(self.cfg)
        store.batches = cached_batches(
            self.cfg, self.sae.cfg, self._share_of_batch(), store.tokens
        )
        return store

    def _to_load(
        self, cfg: LanguageModelSAERunnerConfig[Any]
    ) -> LanguageModelSAERunnerConfig[Any]:
        """Make the config by which SAELens loads model, text and SAE."""
        return copy(cfg)

    def _share_of_batch(self) -> slice:
        """Rows of each batch that this process trains on."""
        return slice(None)

    def _require_activations(self, dataset_is_named: bool) -> None:
        """Refuse a text without a prompt, and a model without the SAE's activations."""
        cfg = self.cfg
        require_context("context_size", cfg.context_size, self.model)
        named = f"dataset_path {cfg.dataset_path}"
        text = named if dataset_is_named else "override_dataset"
        if self._num_processes > 1:
            text = f"the share that each of {self._num_processes} processes reads of {text}"
        skip_missing_texts(self.activations_store)
        tokens = first_prompt(text, self.activations_store)
        excluded = self.activations_store.exclude_special_tokens
        if excluded is not None:
            read = tokens[:, slice(*cfg.seqpos_slice)].to(excluded.device)
            if torch.isin(read, excluded).all():
                # SAELens would read on for a token to train on, for ever.
                raise ValueError(
                    "exclude_special_tokens must leave tokens to train on, got "
                    f"{cfg.exclude_special_tokens!r}, which are all that the first "
                    "prompt has"
                )
        # A first run of another shape would be compiled.
        if not cfg.compile_llm:
            require_hook(
                self.model,
                cfg.model_name,
                tokens,
                cfg.hook_name,
                cfg.hook_head_index,
                self.sae.cfg.d_in,
                cfg.model_kwargs,
            )

    @override
    def run(self) -> Any:
        """
        Train, and save the SAE.

        Returns:
            The trained SAE.
        """
        if self.cfg.resume_from_checkpoint is not None:
            # SAELens would do so while its thread, with prefetch_llm_batches, reads the text.
            self.activations_store.load_from_checkpoint(self.cfg.resume_from_checkpoint)
        return super().run()

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

        self._set_up_optimizer(trainer)
        # An earlier run of this runner may have been interrupted.
        self._interrupted = False
        with handling_signals(interrupt):
            return trainer.fit()

    def _set_up_optimizer(self, trainer: SAETrainer[Any, Any]) -> None:
        for group in trainer.optimizer.param_groups:
            # None is torch's default; False would also refuse its foreach implementation.
            group["fused"] = self.fused_optimizer or None
        apply_lr_factors(trainer.optimizer, self.sae, self.lr_factors)

    @override
    def save_final_sae(self, *args: Any, **kwargs: Any) -> None:
        """Save the trained SAE; a signal that comes meanwhile takes effect afterwards."""
        with signals_afterwards():
            super().save_final_sae(*args, **kwargs)

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        message = "no checkpoint was saved: checkpoint_path is not set"
        if checkpoint_path is not None:
            factors = json.dumps(self.lr_factors)
            # First: where a checkpoint lacks SAELens's last file, it is refused.
            write_whole(checkpoint_path / LR_FACTORS_FILENAME, factors)
            message = f"resume_from_checkpoint {checkpoint_path} goes on from here"
        super().save_checkpoint(checkpoint_path)
        # Once training is over there is nothing to resume: the run ends as usual.
        is_final = checkpoint_path and checkpoint_path.name.startswith("final_")
        if self._interrupted and not is_final:
            raise InterruptedException(message)


@contextmanager
def handling_signals(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Handle interruptions by a handler of one's own, and by those from before afterwards."""
    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def signals_afterwards() -> Iterator[None]:
    """Let interruptions take effect afterwards, unless an error comes first."""
    came: list[int] = []
    with handling_signals(lambda number, _: came.append(number)):
        yield
    for number in came:
        signal.raise_signal(number)


def _require_override(dataset: Any, sae: Any, d_in: int) -> None:
    """Refuse a text or an SAE that a runner is given and cannot train with."""
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        raise ValueError(
            f"override_dataset must be one of its splits, got all of {list(dataset)}"
        )
    # SAELens would take dataset_path instead.
    if dataset is not None and not dataset:
        raise ValueError("override_dataset must not be empty")
    if sae is None:
        return
    if not isinstance(sae, TrainingSAE):
        raise ValueError(
            f"override_sae must be a training SAE, got {type(sae).__name__}"
        )
    if sae.cfg.d_in != d_in:
        # The store takes its width from the config.
        raise ValueError(f"d_in must be {sae.cfg.d_in}, as of override_sae, got {d_in}")

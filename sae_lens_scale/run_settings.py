"""Checks of a training run's settings, and of what it goes on from, before anything is loaded."""

import json
import math
from collections.abc import Iterable
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATION_WHITENING_FILENAME,
    ACTIVATIONS_STORE_STATE_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.saes.sae import SAEConfig
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.util import str_to_dtype
from safetensors import safe_open

from sae_lens_scale.cache.manifest import reads_cache, require_cache
from sae_lens_scale.files import read_json, require_writable
from sae_lens_scale.loading.errors import is_of_the_machine, require_device
from sae_lens_scale.upstream import buffer_argument

# Fields of an SAE's config that decide what an SAE that is loaded is.
SIZES = ("architecture", "d_in", "d_sae", "k", "num_experts", "experts_per_token")
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
# Of the activations that the SAE has learnt to reconstruct.
_ACTIVATIONS = ("hook_name", "hook_head_index")
# Fields of the SAE's config that its weights, the optimizer's state of each, and the scale of
# activations that they expect decide. After its end a run has folded that scale in.
_WEIGHTS = (
    "architecture",
    "d_in",
    "d_sae",
    "num_experts",
    "feature_scaling",
    "decomposition",
    "router_lr_factor",
    "normalize_activations",
)
# Normalisations that SAELens estimates before the first step, and keeps outside the SAE.
ESTIMATED_NORMALIZATIONS = ("expected_average_only_in", "covariance_whitening")


def require_settings(
    cfg: LanguageModelSAERunnerConfig[Any], processes: int = 1
) -> None:
    """
    Refuse settings of a run that would fail, or train nothing, once it has begun.

    Args:
        cfg: Config of the run.
        processes: Number of those that share out each batch, each with a buffer of its own.

    Raises:
        ValueError: If a setting is wrong.
        OSError: If a folder to write into is none.
    """
    _require_counts(cfg, processes)
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        # "False", from a JSON file, would count as true.
        if field.type is bool and isinstance(value, str):
            raise ValueError(f"{field.name} must be a bool, got {value!r}")
    if not 0 <= cfg.activations_mixing_fraction <= 1:
        raise ValueError(
            "activations_mixing_fraction must be from 0 to 1, got "
            f"{cfg.activations_mixing_fraction!r}"
        )
    _require_schedule(cfg)
    str_to_dtype(cfg.dtype)
    for name in ("device", "act_store_device"):
        require_device(name, getattr(cfg, name))
    folders = {n: getattr(cfg, n) for n in ("output_path", "checkpoint_path")}
    for name, folder in folders.items():
        # SAELens would notice when it saves, at the end.
        if folder is not None:
            require_writable(name, folder)
    if any(folder is not None for folder in folders.values()):
        _require_json(cfg)
    if (
        cfg.use_cached_activations
        and not Path(str(cfg.cached_activations_path)).is_dir()
    ):
        raise NotADirectoryError(
            f"cached_activations_path: {cfg.cached_activations_path} is no folder"
        )
    if reads_cache(cfg):
        require_cache(cfg)


def _require_counts(cfg: LanguageModelSAERunnerConfig[Any], processes: int) -> None:
    """Refuse counts that are too small, or no integers where SAELens needs them."""
    (buffer,) = buffer_argument(1)
    for name in ("training_tokens", buffer, "feature_sampling_window"):
        _require_count(cfg, name)
    for name in ("train_batch_size_tokens", "store_batch_size_prompts"):
        _require_count(cfg, name, Integral)
    for name in (
        "n_checkpoints",
        "lr_warm_up_steps",
        "lr_decay_steps",
        "dead_feature_window",
    ):
        _require_count(cfg, name, least=0)
    if cfg.n_checkpoints > 0:
        _require_count(cfg, "training_tokens", Integral)
    if cfg.sae.normalize_activations in ESTIMATED_NORMALIZATIONS:
        _require_count(cfg, "n_batches_for_norm_estimate", Integral)
    logger = cfg.logger
    if logger.log_to_wandb:
        for name in ("wandb_log_frequency", "eval_every_n_wandb_logs"):
            _require_count(logger, name)
        steps = math.ceil(cfg.training_tokens / cfg.train_batch_size_tokens)
        if steps >= logger.wandb_log_frequency * logger.eval_every_n_wandb_logs:
            _require_count(cfg, "n_eval_batches", Integral)
            if cfg.eval_batch_size_prompts is not None:
                _require_count(cfg, "eval_batch_size_prompts", Integral, least=0)
    if cfg.context_size < 1 + cfg.prepend_bos:
        raise ValueError(
            f"context_size must be at least {1 + cfg.prepend_bos}, with "
            f"prepend_bos={cfg.prepend_bos}, got {cfg.context_size}"
        )
    used = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    contexts = getattr(cfg, buffer)
    share = math.ceil(cfg.train_batch_size_tokens / processes)
    if used * contexts < share:
        of_each = "" if processes == 1 else f"the {share} of each process, of "
        raise ValueError(
            f"{buffer} must be so many contexts of {used} tokens that they hold {of_each}"
            f"train_batch_size_tokens={cfg.train_batch_size_tokens}, got {contexts}"
        )


def _require_count(owner: Any, name: str, kind: type = Real, least: int = 1) -> None:
    value = getattr(owner, name)
    if not (isinstance(value, kind) and value >= least):
        wanted = "positive" if least else "at least 0"
        integer = ", and an integer" if kind is Integral else ""
        raise ValueError(f"{name} must be {wanted}{integer}, got {value!r}")


def _require_json(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Refuse values that SAELens could not save with the SAE, and would notice at the end."""
    for name, value in cfg.to_dict().items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name} cannot be saved as JSON: {error}; got {value!r}"
            ) from error


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


def require_sae_of_folder(cfg: LanguageModelSAERunnerConfig[Any], folder: Path) -> None:
    """
    Refuse a config of another SAE than the one in ``from_pretrained_path``, which is trained.

    Args:
        cfg: Config of the run.
        folder: The folder.

    Raises:
        FileNotFoundError: If there is no SAE in it.
        ValueError: If a field is another one there.
    """
    saved = read_settings("from_pretrained_path", folder / SAE_CFG_FILENAME)
    given = cfg.sae.to_dict()
    for name in SIZES:
        # Of another version, it may lack one.
        if name in given and saved.get(name, given[name]) != given[name]:
            raise ValueError(
                f"{name} must be {saved[name]!r}, as in {folder}, whose SAE is trained, "
                f"got {given[name]!r}"
            )


def require_checkpoint(
    cfg: LanguageModelSAERunnerConfig[Any], checkpoint: Path
) -> None:
    """
    Refuse a checkpoint that a run with this config cannot go on from.

    Args:
        cfg: Config of the run.
        checkpoint: Folder of the checkpoint.

    Raises:
        FileNotFoundError: If one of its files is missing.
        ValueError: If a file is damaged, or a setting is another one there.
    """
    settings = [*_ACTIVATIONS, *_schedule_of(cfg), *_order_of(cfg)]
    _require_same(checkpoint, RUNNER_CFG_FILENAME, cfg, settings)
    names = [
        SAE_CFG_FILENAME,
        SAE_WEIGHTS_FILENAME,
        TRAINER_STATE_FILENAME,
        ACTIVATION_SCALER_CFG_FILENAME,
        ACTIVATIONS_STORE_STATE_FILENAME,
    ]
    saved = read_settings("resume_from_checkpoint", checkpoint / SAE_CFG_FILENAME)
    if saved.get("normalize_activations") == "covariance_whitening":
        # SAELens would take it that there was none, and estimate another.
        names.append(ACTIVATION_WHITENING_FILENAME)
    for name in names:
        _require_whole(checkpoint / name)


def require_sae_of_checkpoint(cfg: SAEConfig, checkpoint: Path) -> None:
    """
    Refuse an SAE that cannot take over the weights and the optimizer's state of a checkpoint.

    Args:
        cfg: Config of the SAE.
        checkpoint: Folder of the checkpoint.

    Raises:
        ValueError: If a field is another one there.
    """
    _require_same(checkpoint, SAE_CFG_FILENAME, cfg, _WEIGHTS)


def read_settings(setting: str, path: Path) -> dict[str, Any]:
    """
    Read a config from a JSON file.

    Args:
        setting: What the user calls the setting that names the file's folder.
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no config.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{setting}: there is no {path}")
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold settings, got {settings!r}")
    return settings


def _schedule_of(cfg: LanguageModelSAERunnerConfig[Any]) -> list[str]:
    """Settings that a checkpoint decides, but for those that the scheduler ignores."""
    scheduler = cfg.lr_scheduler_name.lower()
    names: list[str] = [*_SCHEDULE]
    if scheduler != "cosineannealingwarmrestarts":
        names.remove("n_restart_cycles")
    if scheduler == "constant":
        names.remove("lr_end")
    if scheduler != "constant" or cfg.lr_decay_steps:
        names += _LENGTH
    return names


def _order_of(cfg: LanguageModelSAERunnerConfig[Any]) -> list[str]:
    """Settings that decide which tokens of a cache a run has read, and which are next."""
    if not reads_cache(cfg):
        return []
    names = ["seed", *buffer_argument(1)]
    if cfg.sae.normalize_activations in ESTIMATED_NORMALIZATIONS:
        names += ["n_batches_for_norm_estimate", "train_batch_size_tokens"]
    return names


def _require_same(
    checkpoint: Path, filename: str, cfg: Any, names: Iterable[str]
) -> None:
    """Refuse settings other than those in a file of the checkpoint that a run goes on from."""
    before = read_settings("resume_from_checkpoint", checkpoint / filename)
    given = cfg.to_dict()
    for name in names:
        # Of another version, or architecture, either may lack one.
        if name in given and before.get(name, given[name]) != given[name]:
            raise ValueError(
                f"{name} must be {before[name]!r}, as in {checkpoint}, whose run "
                f"goes on, got {given[name]!r}; from_pretrained_path begins another run "
                "from its weights"
            )


def _require_whole(path: Path) -> None:
    """Refuse a file of a checkpoint that is missing or cut short; tensors are not read."""
    if not path.is_file():
        raise FileNotFoundError(f"resume_from_checkpoint: there is no {path}")
    try:
        if path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".pt":
            torch.load(path, map_location="meta", mmap=True)
        else:
            with safe_open(path, "pt"):
                pass
    except Exception as error:
        if is_of_the_machine(error):
            raise
        raise ValueError(f"resume_from_checkpoint: {path} is damaged") from error

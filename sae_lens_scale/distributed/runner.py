"""SAELens's training runner on several processes."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, redirect_stderr
from copy import copy
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from types import NoneType
from typing import Any

import torch
import torch.distributed as dist
import wandb
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from sae_lens.config import HfDataset, LanguageModelSAERunnerConfig
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.training.types import DataProvider
from safetensors.torch import load_file, save_file
from transformer_lens.hook_points import HookedRootModule
from typing_extensions import override

from sae_lens_scale.cache.manifest import reads_cache
from sae_lens_scale.cache.store import CachedActivationsStore
from sae_lens_scale.loading.errors import require_device
from sae_lens_scale.runner import (
    InterruptibleTrainingRunner,
    handling_signals,
    signals_afterwards,
)
from sae_lens_scale.saes.mixture.training import MixtureTrainingSAE
from sae_lens_scale.upstream import InterruptedException

from .groups import Group, make_mesh, on_first, require_same
from .sae import distribute, make_ownership, require_ordinary
from .trainer import DistributedTrainer

_ROWS = "n_dataset_processed"
# Fields that name a device, of which each process has its own.
_DEVICES = ("device", "llm_device", "act_store_device")
# Files that a run may have or not, which decides what the processes do together.
_OPTIONAL = (
    "from_pretrained_path",
    "resume_from_checkpoint",
    "checkpoint_path",
    "output_path",
)
# Besides those, fields that may differ: each machine may have its files elsewhere. Of the logger
# the first process's counts, but for what all do together.
_OF_EACH = (
    *_DEVICES,
    "model_name",
    "model_kwargs",
    "model_from_pretrained_kwargs",
    "dataset_path",
    "cached_activations_path",
    *_OPTIONAL,
    "logger",
    "metadata",
    "verbose",
)
_LOGGED = ("log_to_wandb", "wandb_log_frequency", "eval_every_n_wandb_logs")


class DistributedTrainingRunner(InterruptibleTrainingRunner):
    """
    InterruptibleTrainingRunner on all processes that torchrun has started.

    Each reads its own part of the text, and they train one SAE: that of one process with the
    same batches. Numbers of tokens in the config (``training_tokens``,
    ``train_batch_size_tokens``) count those of all processes, so that a config needs no
    change for more of them. Checkpoints, exports and what is logged are those of one
    process, from the first one; every process reads a checkpoint that a run goes on from.
    After a restart by torchrun the run goes on from its newest checkpoint. A signal to any
    process stops all after the same step, with one checkpoint; a second one changes nothing.

    Args:
        cfg: Config of the run; the same on all processes. Device "cuda" is the process's GPU.
        override_dataset: The whole text, instead of the config's.
        override_model: The language model, instead of the config's.
        override_sae: The SAE to train, instead of a new one; the first process's counts. It is
            shared out in place, and of no use afterwards.
        expert_parallel: Number of neighbouring processes that share out the experts among
            them; 1 for whole SAEs on all processes.
        timeout: Longest wait for another process before the run fails; None for torch's.
        fused_optimizer: As :class:`.InterruptibleTrainingRunner`.
        lr_factors: Likewise.

    Raises:
        ValueError: As that; if settings differ from process to process; if the processes
            cannot share out the batch, the text or the experts, if the config has an option that
            several processes cannot have, or if torchrun is to restart a run that it gives no
            name.
    """

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        override_dataset: HfDataset | None = None,
        override_model: HookedRootModule | None = None,
        override_sae: TrainingSAE[Any] | None = None,
        *,
        expert_parallel: int = 1,
        timeout: timedelta | None = None,
        fused_optimizer: bool = False,
        lr_factors: Mapping[str, float] | None = None,
    ):
        require_ordinary(override_sae)
        # Its own: SAELens draws another checkpoint_path for each copy that it makes.
        cfg = copy(cfg)
        local = int(os.environ.get("LOCAL_RANK", "0"))
        for name in _DEVICES:
            if getattr(cfg, name) == "cuda":
                setattr(cfg, name, f"cuda:{local}")
        # Here, where torch and NCCL would fail on it in words of their own.
        require_device("device", str(cfg.device))
        on_gpu = str(cfg.device).startswith("cuda")
        if on_gpu:
            torch.cuda.set_device(cfg.device)
        self._owns_processes = not dist.is_initialized()
        if self._owns_processes:
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
        require_same(
            {
                "torchrun's --max-restarts": _max_restarts(),
                "expert_parallel": expert_parallel,
                "lr_factors": lr_factors,
                **_common_settings(cfg),
            }
        )
        self._mesh = make_mesh(expert_parallel, timeout)
        self._num_processes = self._mesh.world.size
        self._require_shares(cfg, override_dataset)
        self._is_fresh = override_sae is None and cfg.from_pretrained_path is None
        if self._is_fresh:
            make_ownership(cfg.sae, self._mesh)
        share_checkpoints(cfg, self._mesh.world)
        with _quiet_unless_first(self._mesh.world.rank):
            super().__init__(
                cfg,
                override_dataset,
                override_model,
                override_sae,
                fused_optimizer=fused_optimizer,
                lr_factors=lr_factors,
            )
        if self._is_fresh:
            self.sae.device = torch.device(cfg.device)
            self.sae.cfg.device = cfg.sae.device
        # Of an SAE that is given.
        make_ownership(self.sae.cfg, self._mesh)
        if cfg.use_cached_activations:
            self._share_text()
        share = self._share_of_batch()
        self.activations_store.train_batch_size_tokens = share.stop - share.start

    def _require_shares(
        self, cfg: LanguageModelSAERunnerConfig[Any], text: HfDataset | None
    ) -> None:
        if cfg.train_batch_size_tokens < self._mesh.world.size:
            raise ValueError(
                f"train_batch_size_tokens must be at least the {self._mesh.world.size} "
                f"processes, got {cfg.train_batch_size_tokens}"
            )
        if cfg.compile_sae:
            raise ValueError(
                "compile_sae must be False with several processes, got True"
            )
        # SAELens also takes other iterables, of which every process would read all.
        if not isinstance(text, (Dataset, IterableDataset, NoneType)):
            raise ValueError(
                "override_dataset must be a Dataset or an IterableDataset with several "
                f"processes, got {type(text).__name__}"
            )

    @override
    def _cached_store(
        self, live: LanguageModelSAERunnerConfig[Any]
    ) -> CachedActivationsStore:
        store = super()._cached_store(live)
        # The first process has made the SAE meanwhile, which may take longer than a message.
        on_first(self._mesh.world, lambda: None)
        # It may have grown while one process looked, or be another copy on one machine.
        require_same({"number of tokens in cached_activations_path": store.tokens})
        return store

    @override
    def _to_load(
        self, cfg: LanguageModelSAERunnerConfig[Any]
    ) -> LanguageModelSAERunnerConfig[Any]:
        live = super()._to_load(cfg)
        if self._is_fresh and self._mesh.world.rank:
            # Its weights will be parts of the first process's.
            live.device, live.sae = "meta", replace(cfg.sae, device="meta")
        return live

    @override
    def _share_of_batch(self) -> slice:
        world, tokens = self._mesh.world, self.cfg.train_batch_size_tokens
        return slice(*(tokens * (world.rank + i) // world.size for i in (0, 1)))

    @override
    def _require_activations(self, dataset_is_named: bool) -> None:
        self._share_text()
        super()._require_activations(dataset_is_named)

    def _share_text(self) -> None:
        """Let the store read this process's rows: each as many as processes after the last."""
        store, world = self.activations_store, self._mesh.world
        cached = store.cached_activation_dataset
        rows = store.dataset if cached is None else cached
        # SAELens reads cached activations in whole batches only.
        least = 1 if cached is None else store.store_batch_size_prompts
        if isinstance(rows, Dataset) and len(rows) < least * world.size:
            name, wanted = "the text", "a row"
            if cached is not None:
                name, wanted = "cached_activations_path", f"{least} rows, a batch,"
            raise ValueError(
                f"{name} must have {wanted} for each of the {world.size} processes, got "
                f"{len(rows)}"
            )
        if cached is not None:
            store.cached_activation_dataset = cached.shard(world.size, world.rank)
        elif isinstance(rows, IterableDataset):
            store.dataset = split_dataset_by_node(rows, world.rank, world.size)
        elif isinstance(rows, Dataset):
            # Not neighbours: the first rows are read first by any number of processes.
            store.dataset = rows.shard(world.size, world.rank, contiguous=False)

    @override
    def run(self) -> Any:
        """
        Train, and save the SAE.

        Returns:
            The trained SAE, an ordinary one, on the first process; None on the others.

        Raises:
            ValueError: If it has been called before; if the loss is not finite.
        """
        require_ordinary(self.sae)
        cfg, world = self.cfg, self._mesh.world
        self._set_sae_metadata()
        if cfg.logger.log_to_wandb:
            wandb.init(
                project=cfg.logger.wandb_project,
                entity=cfg.logger.wandb_entity,
                config=cfg.to_dict(),
                name=cfg.logger.run_name,
                id=cfg.logger.wandb_id,
                mode="disabled" if world.rank else None,
            )
        assert isinstance(self.sae, MixtureTrainingSAE)
        checkpoint = cfg.resume_from_checkpoint
        if checkpoint is not None:
            on_first(world, lambda: self.sae.load_weights_from_checkpoint(checkpoint))
            if world.rank:
                self.sae._end_start()
            self._go_on_reading(Path(checkpoint))
        data_provider: DataProvider = self.activations_store
        reading = nullcontext()
        if cfg.prefetch_llm_batches:
            data_provider = PrefetchingIterator(
                iter(self.activations_store), prefetch=int(cfg.prefetch_llm_batches)
            )
            reading = closing(data_provider)
        with reading, _quiet_unless_first(world.rank):
            trainer = DistributedTrainer(
                cfg.to_sae_trainer_config(),
                distribute(self.sae, self._mesh),
                data_provider,
                self._evaluate,
                self.save_checkpoint,
                self._count_rows,
            )
            if checkpoint is not None:
                trainer.load_trainer_state(checkpoint)
                # Each machine may have a copy of its own.
                step = trainer.n_training_samples
                require_same({"tokens trained on in resume_from_checkpoint": step})
            self.run_trainer_with_interruption_handling(trainer)
            # Here a signal to one would lose what all have trained since the last checkpoint.
            with signals_afterwards():
                whole = trainer.sae.whole(cfg.output_path)
                if cfg.output_path is not None:
                    final = (whole, cfg.output_path, trainer.log_feature_sparsity)
                    on_first(world, lambda: self.save_final_sae(*final))
        if cfg.logger.log_to_wandb:
            wandb.finish()
        if self._owns_processes:
            dist.destroy_process_group()
        return whole

    @override
    def run_trainer_with_interruption_handling(
        self, trainer: SAETrainer[Any, Any]
    ) -> Any:
        assert isinstance(trainer, DistributedTrainer)

        def interrupt(*_: Any) -> None:
            if trainer.n_training_samples == 0:
                raise InterruptedException("no checkpoint was saved")
            # Also for a second one: a scheduler may signal torchrun, which passes it on, and
            # its processes. What hangs torchrun kills.
            trainer.stop = True

        self._set_up_optimizer(trainer)
        with handling_signals(interrupt):
            return trainer.fit()

    def _evaluate(
        self, sae: Any, data_provider: DataProvider, scaler: ActivationScaler
    ) -> dict[str, dict[str, float]]:
        """Metrics of SAELens's evaluation, mean over processes, each on its own text."""
        # By topic.
        metrics = self.evaluator(sae, data_provider, scaler)
        values = [float(v) for of_topic in metrics.values() for v in of_topic.values()]
        means = torch.tensor(values, dtype=torch.float64, device=sae.device)
        self._mesh.world.all_reduce(means, "metrics")
        rest = iter((means / self._mesh.world.size).tolist())
        return {
            topic: {name: next(rest) for name in of_topic}
            for topic, of_topic in metrics.items()
        }

    def _count_rows(self) -> None:
        """Count rows of the text that no process has to read again."""
        world = self._mesh.world
        mine = torch.tensor([self.activations_store.n_dataset_processed])
        counts = world.all_gather(mine.to(self.sae.device), "rows")
        self._rows_read = world.size * max(int(count) for count in counts)

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        super().save_checkpoint(checkpoint_path)
        if checkpoint_path is not None:
            state = self.activations_store.state_dict()
            state[_ROWS] = torch.tensor(self._rows_read)
            save_file(state, checkpoint_path / ACTIVATIONS_STORE_STATE_FILENAME)

    def _go_on_reading(self, checkpoint: Path) -> None:
        """Pass over this process's share of the rows that were read before a checkpoint."""
        state = load_file(checkpoint / ACTIVATIONS_STORE_STATE_FILENAME)
        state[_ROWS] = -(-state[_ROWS] // self._mesh.world.size)
        with TemporaryDirectory() as folder:
            path = str(Path(folder, ACTIVATIONS_STORE_STATE_FILENAME))
            save_file(state, path)
            self.activations_store.load(path)


def _common_settings(cfg: LanguageModelSAERunnerConfig[Any]) -> dict[str, Any]:
    """Settings that all processes have to have in common, by name."""
    settings = cfg.to_dict()
    for name, value in settings.pop("sae").items():
        # Both have a dtype.
        settings[f"sae.{name}" if name in settings else name] = value
    settings |= {name: getattr(cfg.logger, name) for name in _LOGGED}
    common = {name: v for name, v in settings.items() if name not in _OF_EACH}
    common |= {f"{n} is None": getattr(cfg, n) is None for n in _OPTIONAL}
    return common | {"cached_activations_path is a cache": reads_cache(cfg)}


@contextmanager
def _quiet_unless_first(rank: int) -> Iterator[None]:
    """Show progress and warnings of the first process only; errors come afterwards."""
    if rank == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield


def _max_restarts() -> str:
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")


def share_checkpoints(cfg: LanguageModelSAERunnerConfig[Any], world: Group) -> None:
    """
    Let all processes, and all lives of a run that torchrun may restart, have one folder of
    checkpoints, and go on from the newest in it after a restart.

    Args:
        cfg: Config of the run, which is changed.
        world: All processes, which have to call this together.

    Raises:
        ValueError: If a restarted run could not find its folder, or if it could go on from
            a checkpoint of an earlier run that had the same name.
    """
    if cfg.checkpoint_path is None:
        return
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    may_restart = _max_restarts() != "0"
    if run_id == "none" and may_restart:
        raise ValueError(
            "torchrun's --rdzv-id must name the run where --max-restarts is given, whose "
            "checkpoints a restart looks for, got none"
        )
    paths = [cfg.checkpoint_path]
    if may_restart:
        paths = [str(Path(cfg.checkpoint_path).parent / run_id)]
    dist.broadcast_object_list(paths)
    cfg.checkpoint_path = paths[0]
    if not may_restart:
        return
    # Each machine counts the restarts that its own processes have caused.
    restarts = [""] * world.size
    dist.all_gather_object(restarts, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    is_restart = set(restarts) != {"0"}
    if cfg.resume_from_checkpoint and not is_restart:
        return
    folder = Path(paths[0])
    newest = [on_first(world, lambda: _newest_checkpoint(folder, is_restart))]
    dist.broadcast_object_list(newest)
    if newest[0] and not is_restart:
        # A restart would take an earlier run's for its own.
        raise ValueError(
            f"torchrun's --rdzv-id must be another than {run_id}, or checkpoint_path another, "
            "or resume_from_checkpoint be given: an earlier run of that name has left "
            f"{newest[0]}"
        )
    cfg.resume_from_checkpoint = newest[0] or cfg.resume_from_checkpoint


def _newest_checkpoint(folder: Path, is_restart: bool) -> str | None:
    """Find the newest checkpoint; on a restart, remove those that a process died writing."""
    if not folder.is_dir():
        return None
    for unfinished in folder.glob(".saving-*") if is_restart else ():
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            # Of a tensor's memory (mapped_tensor).
            unfinished.unlink(missing_ok=True)
    steps = [path for path in folder.iterdir() if path.name.isdecimal()]
    return str(max(steps, key=lambda path: int(path.name), default="")) or None

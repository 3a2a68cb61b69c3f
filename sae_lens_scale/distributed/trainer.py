"""SAELens's trainer for an SAE that several processes train."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import Evaluator, SAETrainer, SaveCheckpointFn
from sae_lens.training.types import DataProvider
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.serialization import config
from typing_extensions import override

from sae_lens_scale.upstream import InterruptedException

from .data_parallel import DataParallelSAE
from .groups import Group, on_first
from .ownership import EXPERT_DIMENSIONS
from .slices import Slices

# Of SAELens's trainer.
_MAX_NORM = 1.0


@dataclass
class GlobalScaler(ActivationScaler):
    """
    SAELens's scaling of activations, estimated on the batches of all processes.

    Args:
        world: The processes.
        device: Device on which they exchange batches; a store may keep them on another.
    """

    world: Group | None = None
    device: str | torch.device = "cpu"

    @override
    def estimate_scaling_factor(
        self,
        d_in: int,
        data_provider: DataProvider,
        n_batches_for_norm_estimate: int = 1_000,
    ) -> None:
        super().estimate_scaling_factor(
            d_in, self._batches_of_all(data_provider), n_batches_for_norm_estimate
        )

    @override
    def estimate_whitening(
        self,
        d_in: int,
        data_provider: DataProvider,
        n_batches_for_norm_estimate: int = 1_000,
        eps: float = 1e-3,
    ) -> None:
        super().estimate_whitening(
            d_in, self._batches_of_all(data_provider), n_batches_for_norm_estimate, eps
        )

    def _batches_of_all(self, data_provider: DataProvider) -> Iterator[torch.Tensor]:
        assert self.world is not None
        for batch in data_provider:
            yield torch.cat(self.world.all_gather(batch.to(self.device), "scale"))


class DistributedTrainer(SAETrainer[Any, Any]):
    """
    SAELens's trainer on one of several processes.

    Its config, counters, losses and metrics are those of the whole batch and of all latents,
    on every process. Each process makes one, and all make their steps together.

    Args:
        cfg: As SAELens's; ``train_batch_size_samples`` counts the tokens of all processes.
        sae: The SAE, shared out (:func:`.distribute`).
        data_provider: Batches of this process.
        evaluator: As SAELens's; every process calls it.
        save_checkpoint_fn: As SAELens's, for what a checkpoint needs besides; on the first
            process only.
        before_checkpoint: Called before that, on all processes.

    Attributes:
        stop: Set to True to stop all processes after the step that goes on.
    """

    sae: DataParallelSAE

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: DataParallelSAE,
        data_provider: DataProvider,
        evaluator: Evaluator[Any] | None = None,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
        before_checkpoint: Callable[[], None] = lambda: None,
    ):
        super().__init__(cfg, sae, data_provider, evaluator, save_checkpoint_fn)
        self._mesh = sae.mesh
        self._before_checkpoint = before_checkpoint
        self._slices = Slices(
            {n: p for n, p in sae.named_parameters() if n in EXPERT_DIMENSIONS},
            self._mesh.replicas,
        )
        # In their order, by which their state is saved.
        (group,) = self.optimizer.param_groups
        group["params"] = [
            self._slices.get(name, parameter)
            for name, parameter in sae.named_parameters()
        ]
        self.activation_scaler = GlobalScaler(world=self._mesh.world, device=sae.device)
        self.stop = self._is_stopping = False
        # Of the last step: tokens of the whole batch, and latents that fired on each.
        self._batch_tokens, self._l0 = 0, 0.0

    @override
    def step(self, batch: torch.Tensor) -> TrainStepOutput:
        before = self.n_training_samples
        output = super().step(batch)
        self.n_training_samples = before + self._batch_tokens
        return output

    @override
    def _train_step(
        self, sae: DataParallelSAE, sae_in: torch.Tensor
    ) -> TrainStepOutput:
        sae.train()
        with self.autocast_if_enabled:
            output = sae.training_forward_pass(
                TrainStepInput(
                    sae_in=sae_in,
                    dead_neuron_mask=self.dead_neurons,
                    coefficients=self.get_coefficients(),
                    n_training_steps=self.n_training_steps,
                    is_logging_step=self._is_logging_step(),
                )
            )
        output.loss.backward()
        output = self._sum_over_processes(output)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._slices.share_values()
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        return output

    @torch.no_grad()
    def _sum_over_processes(self, output: TrainStepOutput) -> TrainStepOutput:
        """
        Sum gradients, losses and counts of firing latents over all processes, and clip the
        gradients.

        Returns:
            The output, with the losses of the whole batch.

        Raises:
            ValueError: On all processes, if the loss of the whole batch is not finite.
        """
        sae = self.sae
        for parameter in sae.parameters():
            if parameter.grad is None:
                # No latent of this process was asked.
                parameter.grad = torch.zeros_like(parameter)
        names = [name for name, _ in sae.named_parameters()]
        everywhere = self._gradients_of_everywhere()
        losses = torch.stack([loss.detach() for loss in output.losses.values()])
        columns = [
            *everywhere,
            losses,
            self._firing(output.feature_acts),
            losses.new_full((1,), float(self.stop)),
        ]
        dtype = torch.float32
        for column in columns:
            dtype = torch.promote_types(dtype, column.dtype)
        packed = torch.cat([column.flatten().to(dtype) for column in columns])
        self._mesh.world.all_reduce(packed, "gradients of all processes")
        summed = packed.split([column.numel() for column in columns])
        *_, total, firing, stop = summed
        for name, gradient, whole in zip(names, everywhere, summed, strict=False):
            # Of shared experts all replicas' are summed once more.
            copies = self._mesh.replicas.size if name in self._slices else 1
            gradient.copy_(whole.view_as(gradient) / copies)
        shared = [w for n, w in zip(names, summed, strict=False) if n in self._slices]
        self._slices.sum_gradients()
        self._clip_gradients(shared)
        # The host waits for the device here, once.
        numbers = (stop.sum(), total.sum(), firing.sum(), sae.batch_tokens)
        stops, loss, fired, tokens = torch.stack([n.double() for n in numbers]).tolist()
        if stops and not self._is_stopping:
            self._is_stopping = True
            # Due at the end of this step, when weights, optimizer and counters agree.
            self.checkpoint_thresholds.insert(0, -1)
        values = dict(zip(output.losses, total.unbind(), strict=True))
        if not math.isfinite(loss):
            texts = ", ".join(f"{n} {v.item()}" for n, v in values.items())
            raise ValueError(
                f"the loss is not finite at training step {self.n_training_steps} "
                f"({texts}): activations of some process, or the weights, hold NaN or "
                f"infinite values, or ones too large for {sae.dtype}"
            )
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired[firing > 0] = 0
        self.act_freq_scores += firing
        self.n_frac_active_samples += self.cfg.train_batch_size_samples
        self._batch_tokens, self._l0 = int(tokens), fired / tokens
        return replace(output, loss=total.sum(), losses=values)

    def _gradients_of_everywhere(self) -> list[torch.Tensor]:
        """Gradients of what all processes hold: whole parameters, and shared experts."""
        sae, gradients = self.sae, []
        num_shared = sae.ownership.num_shared
        for name, parameter in sae.named_parameters():
            gradient = parameter.grad
            assert gradient is not None
            if name in self._slices:
                dim = EXPERT_DIMENSIONS[name]
                experts = gradient.unflatten(dim, (sae.num_held_experts, -1))
                gradient = experts.narrow(dim, 0, num_shared)
            gradients.append(gradient)
        return gradients

    def _firing(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """Number of this process's rows that each latent fired on, ``[d_sae]``."""
        sae = self.sae
        fired = feature_acts.bool().float().sum(dim=0)
        fired = fired.to_dense() if fired.is_sparse else fired
        of_experts = fired.new_zeros(sae.cfg.num_experts, sae.cfg.expert_size)
        held = sae.ownership.held(sae.ownership.rank)
        of_experts[held] = fired.view(len(held), -1)
        return of_experts.flatten()

    def _clip_gradients(self, shared: list[torch.Tensor]) -> None:
        """
        Clip by the norm of the whole gradient, as SAELens's trainer does.

        Args:
            shared: Gradients of shared experts, which all of those that share out the
                experts hold.
        """
        names = [name for name, _ in self.sae.named_parameters()]
        (group,) = self.optimizer.param_groups
        gradients = {n: p.grad for n, p in zip(names, group["params"], strict=True)}
        sliced = [g for n, g in gradients.items() if n in self._slices]
        others = [g for n, g in gradients.items() if n not in self._slices]
        square = self._mesh.world.all_reduce(_squared_norm(sliced), "norm")
        square = square - (self._mesh.experts.size - 1) * _squared_norm(shared)
        norm = (square + _squared_norm(others)).clamp(min=0).sqrt()
        clip_grads_with_norm_(group["params"], _MAX_NORM, norm)

    @override
    @torch.no_grad()
    def build_train_step_log_dict(
        self, output: TrainStepOutput, n_training_samples: int
    ) -> dict[str, Any]:
        logged = super().build_train_step_log_dict(output, n_training_samples)
        logged["metrics/l0"] = self._l0
        x, errors = output.sae_in.double(), (output.sae_out - output.sae_in).double()
        sums = torch.cat(
            [x.sum(0), x.pow(2).sum().view(1), errors.pow(2).sum().view(1)]
        )
        self._mesh.world.all_reduce(sums, "metrics")
        *_, squares, error = sums
        n = self._batch_tokens
        mean = sums[:-2] / n
        variance = squares - n * mean.pow(2).sum()
        logged["metrics/explained_variance"] = (1 - error / variance).item()
        # SAELens's older metric, of each token by itself.
        of_tokens = 1 - errors.pow(2).sum(-1) / (x - mean).pow(2).sum(-1)
        moments = torch.stack([of_tokens.sum(), of_tokens.pow(2).sum()])
        self._mesh.world.all_reduce(moments, "metrics")
        center, square = (moments / n).unbind()
        std = ((square - center**2).clamp(min=0) * n / max(1, n - 1)).sqrt()
        logged["metrics/explained_variance_legacy"] = center.item()
        logged["metrics/explained_variance_legacy_std"] = std.item()
        return logged

    @override
    def _checkpoint_if_needed(self) -> None:
        super()._checkpoint_if_needed()
        # Once training is over there is nothing to resume: the run ends as usual.
        is_over = self.n_training_samples >= self.cfg.total_training_samples
        if self._is_stopping and not is_over:
            message = "no checkpoint was saved: checkpoint_path is not set"
            if self.cfg.checkpoint_path is not None:
                path = Path(self.cfg.checkpoint_path, str(self.n_training_samples))
                message = f"resume_from_checkpoint {path} goes on from here"
            raise InterruptedException(message)

    @override
    @torch.no_grad()
    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        """
        Save a checkpoint of one process, whole or not at all; on all processes together.

        Raises:
            RuntimeError: If the first process could not; that one raises its own error.
        """
        base = self.cfg.checkpoint_path if base_path is None else base_path
        self._before_checkpoint()
        sae, optimizer = self.sae.whole(base), self._whole_optimizer(base)

        def save() -> None:
            # SAELens's own trainer saves what it is made of.
            one: SAETrainer[Any, Any] = SAETrainer.__new__(SAETrainer)
            vars(one).update(vars(self) | {"sae": sae, "optimizer": optimizer})
            if base is None:
                one.save_checkpoint(checkpoint_name, None, wandb_aliases)
                return
            final = Path(base, checkpoint_name)
            final.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=".saving-", dir=base) as folder:
                one.save_checkpoint(checkpoint_name, folder, wandb_aliases)
                if final.exists():
                    # Of a run that went on from before: replaced by the same step's.
                    final.rename(Path(folder, "before"))
                Path(folder, checkpoint_name).rename(final)

        on_first(self._mesh.world, save)

    def _whole_optimizer(self, folder: Path | str | None) -> "_State":
        """
        Gather the optimizer's state as one process has it, on the first one.

        Args:
            folder: As of :meth:`.DataParallelSAE.whole`.
        """
        sae, state = self.sae, self.optimizer.state_dict()
        names = [name for name, _ in sae.named_parameters()]
        for index, values in state["state"].items():
            state["state"][index] = {
                key: self._whole_state(names[index], value, folder)
                if value.dim()
                else value
                for key, value in values.items()
            }
        return _State(state)

    def _whole_state(
        self, name: str, value: torch.Tensor, folder: Path | str | None
    ) -> torch.Tensor | None:
        if name in self._slices:
            value = self._slices.whole(name, value)
        return self.sae.gathered(name, value, folder)

    @override
    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        device, mapped = self.cfg.device, config.load.mmap
        # The file's own memory, of which each process copies its parts.
        self.cfg.device, config.load.mmap = "cpu", True
        hook = self.optimizer.register_load_state_dict_pre_hook(self._parts_of_state)
        try:
            super().load_trainer_state(checkpoint_path)
        finally:
            hook.remove()
            self.cfg.device, config.load.mmap = device, mapped
        for name in ("act_freq_scores", "n_forward_passes_since_fired"):
            setattr(self, name, getattr(self, name).clone().to(device))
        # SAELens would save one again for each that has been saved.
        done, thresholds = self.n_training_samples, self.checkpoint_thresholds
        self.checkpoint_thresholds = [t for t in thresholds if t >= done]

    def _parts_of_state(
        self, _optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        """This process's parts of an optimizer's state."""
        names = [name for name, _ in self.sae.named_parameters()]
        states = {
            index: {
                key: self._part_of_state(names[index], value)
                for key, value in values.items()
            }
            for index, values in state_dict["state"].items()
        }
        return state_dict | {"state": states}

    def _part_of_state(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if not value.dim():
            # A step's number: as it is, it would keep the file mapped for the whole run.
            return value.clone()
        part = self.sae.ownership.part(name, value)
        if name not in self._slices:
            return part
        own = self._slices.own(name, part)
        # A slice alone would keep all of the part.
        return own if own is part else own.clone()


def _squared_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Square of the norm of all gradients; float16 holds no square of more than 256."""
    norm = get_total_norm(gradients)
    return norm.to(torch.promote_types(norm.dtype, torch.float32)).square()


class _State:
    """A state, as an optimizer has one."""

    def __init__(self, state: dict[str, Any]):
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._state

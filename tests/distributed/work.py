"""Work that tests give to groups of processes."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from helpers import files_no_larger_than, scale_sae, step_input, switch_sae
from sae_lens.config import (
    LoggingConfig,
    SAETrainerConfig,
)
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_scale import ScaleTrainingSAE
from sae_lens_scale.distributed import expert_parallel
from sae_lens_scale.distributed.groups import Mesh, make_mesh, on_first
from sae_lens_scale.distributed.ownership import EXPERT_DIMENSIONS
from sae_lens_scale.distributed.sae import distribute
from sae_lens_scale.distributed.trainer import DistributedTrainer
from sae_lens_scale.files import write_whole


def scale_sae_of_one_owner(seed: int = 0, **overrides: Any) -> ScaleTrainingSAE:
    """A Scale SAE whose tokens all choose its last experts."""
    sae = scale_sae(seed, **overrides)
    W_router, b_router = (t.detach().clone() for t in sae.applied_router())
    direction = torch.ones(len(b_router), dtype=b_router.dtype) / len(b_router) ** 0.5
    W_router[:, -sae.cfg.experts_per_token :] += 5 * direction.unsqueeze(-1)
    sae.set_router(W_router, b_router - 10 * direction)
    return sae


MAKERS = {
    "scale": scale_sae,
    "switch": switch_sae,
    "one owner": scale_sae_of_one_owner,
}


def make_sae(architecture: str, overrides: dict[str, Any], rank: int = 0) -> Any:
    """A small SAE; a fresh one, which is not random, if it is to start from activations."""
    sae = MAKERS[architecture](seed=rank, **overrides)
    return type(sae)(sae.cfg) if sae.cfg.initialize_from_activations else sae


_meshes: dict[int, Mesh] = {}


def mesh_of(expert_parallel: int) -> Mesh:
    """A mesh, made once, with nothing counted."""
    mesh = _meshes.setdefault(expert_parallel, make_mesh(expert_parallel))
    for group in (mesh.world, mesh.experts, mesh.replicas):
        group.sent.clear()
        group.calls.clear()
    return mesh


def part_of(x: torch.Tensor, sizes: Sequence[int] | None, mesh: Mesh) -> torch.Tensor:
    """This process's tokens of a batch: so many, or as many as on the others."""
    world = mesh.world
    if sizes is None:
        return x.tensor_split(world.size)[world.rank]
    return x.split(list(sizes))[world.rank]


def training_step(
    architecture: str,
    overrides: dict[str, Any],
    x: torch.Tensor,
    dead: torch.Tensor | None,
    expert_parallel: int,
    sizes: Sequence[int] | None = None,
    autocast: bool = False,
) -> dict[str, Any]:
    """One forward and backward pass; what this process has of it."""
    mesh = mesh_of(expert_parallel)
    # Of all processes, the first one's weights count.
    sae = distribute(MAKERS[architecture](seed=mesh.world.rank, **overrides), mesh)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = sae.training_forward_pass(step_input(part_of(x, sizes, mesh), dead))
    output.loss.backward()
    return {
        "sae_out": output.sae_out.detach(),
        "losses": {name: v.detach() for name, v in output.losses.items()},
        "gradients": {name: p.grad for name, p in sae.named_parameters()},
        "held": sae.ownership.held(sae.ownership.rank),
        "sent": dict(mesh.world.sent + mesh.experts.sent),
        "calls": dict(mesh.world.calls + mesh.experts.calls),
    }


def in_parts(at_a_time: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """Do work with so many numbers of inputs or products made at a time."""
    with patch.object(expert_parallel, "_AT_A_TIME", at_a_time):
        return work(*arguments)


def omegas_logged(
    overrides: dict[str, Any], x: torch.Tensor, expert_parallel: int | None = None
) -> tuple[dict[str, float], list[float]]:
    """Metrics of omega, and its histogram's values; None for an SAE of one process."""
    sae, mine = scale_sae(**overrides), x
    if expert_parallel is not None:
        mesh = mesh_of(expert_parallel)
        sae, mine = distribute(sae, mesh), part_of(x, None, mesh)
    step = replace(step_input(mine, None), is_logging_step=True)
    metrics: dict[str, Any] = sae.training_forward_pass(step).metrics
    found = {n: float(v) for n, v in metrics.items() if n.startswith("omega/")}
    return found, sae.log_histograms()["weights/omega"].tolist()


class _WithLayer(ScaleTrainingSAE):
    """A subclass with a layer, and a buffer, of its own."""

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.layer = torch.nn.Linear(3, 2)
        self.register_buffer("numbers", torch.randn(4))


def whole_of_subclass(expert_parallel: int) -> list[dict[str, torch.Tensor] | None]:
    """A subclass's weights before, and the whole SAE's, on this process."""
    mesh = mesh_of(expert_parallel)
    torch.manual_seed(mesh.world.rank)
    sae = _WithLayer(scale_sae().cfg)
    before = {name: t.clone() for name, t in sae.state_dict().items()}
    whole = distribute(sae, mesh).whole()
    return [before, None if whole is None else whole.state_dict()]


def omegas_of_folded(
    normalize_activations: str, expert_parallel: int
) -> tuple[list[float], list[float] | None]:
    """Omegas of one process's SAE, and those that the whole SAE has on record."""
    overrides = {
        "normalize_activations": normalize_activations,
        # With any other only whitening folds omega.
        "decomposition": "identity",
        "num_shared_experts": 1,
    }
    one, mesh = scale_sae(**overrides), mesh_of(expert_parallel)
    assert one.omega is not None
    sae = distribute(scale_sae(**overrides), mesh)
    if normalize_activations == "covariance_whitening":
        eye = torch.eye(sae.cfg.d_in, dtype=sae.dtype)
        sae.fold_activation_whitening(eye[0], 2 * eye, eye / 2)
    else:
        sae.fold_activation_norm_scaling_factor(2.0)
    whole = sae.whole()
    on_record = None if whole is None else whole.cfg.metadata.omega
    return one.omega.tolist(), on_record


@torch.no_grad()
def inference(
    architecture: str, overrides: dict[str, Any], x: torch.Tensor, expert_parallel: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations and reconstructions of this process's tokens, by decode and by forward."""
    mesh = mesh_of(expert_parallel)
    sae = distribute(MAKERS[architecture](**overrides), mesh)
    mine = part_of(x, None, mesh)
    acts = sae.encode(mine)
    return acts, sae.decode(acts), sae(mine)


STEPS, BATCH = 30, 96


def trainer_config(**overrides: Any) -> SAETrainerConfig:
    settings: dict[str, Any] = {
        "n_checkpoints": 0,
        "checkpoint_path": None,
        "save_final_checkpoint": False,
        "total_training_samples": STEPS * BATCH,
        "device": "cpu",
        "autocast": False,
        "lr": 1e-2,
        "lr_end": 1e-3,
        "lr_scheduler_name": "constant",
        "lr_warm_up_steps": 5,
        "adam_beta1": 0.9,
        "adam_beta2": 0.99,
        "lr_decay_steps": 10,
        "n_restart_cycles": 1,
        "train_batch_size_samples": BATCH,
        "dead_feature_window": 0,
        "feature_sampling_window": 20,
        "n_batches_for_norm_estimate": 2,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    return SAETrainerConfig(**(settings | overrides))


def batches(dtype: str) -> Iterator[torch.Tensor]:
    """Activations of a few clusters, some of whose directions are rare."""
    generator = torch.Generator().manual_seed(3)
    like: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    centers, directions = torch.randn(5, 10, **like), torch.randn(40, 10, **like)
    while True:
        cluster = torch.randint(5, (BATCH,), generator=generator)
        active = torch.rand(BATCH, 40, **like) < torch.linspace(0.01, 0.2, 40)
        x = 2 * centers[cluster] + active.double() @ directions
        yield x.to(getattr(torch, dtype))


def _state(trainer: SAETrainer[Any, Any], logged: list[dict[str, Any]]) -> Any:
    return {
        "since_fired": trainer.n_forward_passes_since_fired,
        "frequency": trainer.act_freq_scores,
        "samples": trainer.n_training_samples,
        "logged": logged,
        "adam": len(trainer.optimizer.state),
    }


def _train(trainer: SAETrainer[Any, Any]) -> list[dict[str, Any]]:
    """Train, and return what would be logged, step by step."""
    logged, step = [], trainer.step

    def step_and_log(batch: torch.Tensor) -> Any:
        output = step(batch)
        samples = trainer.n_training_samples
        logged.append(trainer.build_train_step_log_dict(output, samples))
        return output

    trainer.step = step_and_log
    trainer.fit()
    return logged


def _batches_after(checkpoint: Path | None, dtype: str) -> Iterator[torch.Tensor]:
    """The batches that a run, or one that goes on from a checkpoint, is given."""
    steps = 0 if checkpoint is None else int(checkpoint.name) // BATCH
    return islice(batches(dtype), steps, None)


def train_on_one(
    architecture: str,
    overrides: dict[str, Any],
    trainer: dict[str, Any],
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """The run of one process, by SAELens's own trainer."""
    torch.manual_seed(0)
    sae = make_sae(architecture, overrides)
    if checkpoint is not None:
        sae.load_weights_from_checkpoint(checkpoint)
    data = _batches_after(checkpoint, sae.cfg.dtype)
    one = SAETrainer(trainer_config(**trainer), sae, data)
    if checkpoint is not None:
        one.load_trainer_state(checkpoint)
    logged = _train(one)
    return _state(one, logged) | {"weights": sae.state_dict()}


# Changes a batch of a process, or delays it: called with both and the number of the batch.
Disturbance = Callable[[torch.Tensor, Mesh, int], torch.Tensor]


def undisturbed(batch: torch.Tensor, mesh: Mesh, step: int) -> torch.Tensor:
    return batch


def late_on_last(batch: torch.Tensor, mesh: Mesh, step: int) -> torch.Tensor:
    """Have the last process wait now and then."""
    if mesh.world.rank == mesh.world.size - 1 and step % 10 == 3:
        time.sleep(0.3)
    return batch


def nan_on_last(at: int, batch: torch.Tensor, mesh: Mesh, step: int) -> torch.Tensor:
    """Put one NaN into the last process's batch of a step."""
    if mesh.world.rank == mesh.world.size - 1 and step == at:
        batch[0, 0] = float("nan")
    return batch


def make_trainer(
    architecture: str,
    overrides: dict[str, Any],
    trainer: dict[str, Any],
    expert_parallel: int,
    sizes: Sequence[int] | None = None,
    checkpoint: Path | None = None,
    disturb: Disturbance = undisturbed,
) -> DistributedTrainer:
    """This process's trainer of the same run."""
    torch.manual_seed(0)
    mesh = mesh_of(expert_parallel)
    sae = make_sae(architecture, overrides, mesh.world.rank)
    if checkpoint is not None:
        sae.load_weights_from_checkpoint(checkpoint)
    sae = distribute(sae, mesh)
    parts = (
        disturb(part_of(batch, sizes, mesh), mesh, step)
        for step, batch in enumerate(_batches_after(checkpoint, sae.cfg.dtype))
    )
    many = DistributedTrainer(trainer_config(**trainer), sae, parts)
    if checkpoint is not None:
        many.load_trainer_state(checkpoint)
    return many


def train(*arguments: Any) -> dict[str, Any]:
    """This process's share of the same run; arguments are those of ``make_trainer``."""
    many = make_trainer(*arguments)
    logged = _train(many)
    sae = many.sae
    whole = sae.whole()
    return _state(many, logged) | {
        "weights": None if whole is None else whole.state_dict(),
        "bytes": sum(p.nbytes for p in sae.parameters()),
    }


def norm_after_clipping(dtype: str, expert_parallel: int) -> tuple[float, float]:
    """Norm of this process's gradient in W_enc, and of all that optimizers are given."""
    mesh = mesh_of(expert_parallel)
    many = make_trainer("scale", {"dtype": dtype}, {}, expert_parallel)
    (group,) = many.optimizer.param_groups
    norms: list[float] = []

    def note(*_: Any) -> None:
        mine, everywhere = torch.zeros(2, dtype=torch.float64)
        names = [name for name, _ in many.sae.named_parameters()]
        for name, parameter in zip(names, group["params"], strict=True):
            total = mine if name in EXPERT_DIMENSIONS else everywhere
            total += parameter.grad.double().square().sum()
        mesh.world.all_reduce(mine, "test")
        norms.append((mine + everywhere).sqrt().item())

    many.optimizer.register_step_pre_hook(note)
    hook = many.sae.W_enc.register_hook(
        lambda g: norms.append(g.double().norm().item())
    )
    many.step(next(iter(many.data_provider)))
    hook.remove()
    before, after = norms
    return before, after


def train_until_error(*arguments: Any) -> dict[str, Any]:
    """The same, of a run that fails: its error and the last step that changed weights."""
    many = make_trainer(*arguments)
    try:
        many.fit()
    except ValueError as error:
        adam = many.optimizer.state.values()
        return {
            "error": str(error),
            "optimizer_steps": {int(state["step"]) for state in adam},
            "finite": all(bool(p.isfinite().all()) for p in many.sae.parameters()),
        }
    raise AssertionError("training should fail")


def save_on_full_disk(folder: Path, *arguments: Any) -> str:
    """Save a checkpoint, and another for which the first process has no room; its error."""
    many = make_trainer(*arguments)
    batches = iter(many.data_provider)
    many.step(next(batches))
    many.save_checkpoint("1", folder)
    many.step(next(batches))
    # Less than the weights take.
    room = 1_000 if many.sae.mesh.world.rank == 0 else 1_000_000
    try:
        with files_no_larger_than(room):
            many.save_checkpoint("2", folder)
    except Exception as error:
        # The processes still agree on what comes next.
        many.step(next(batches))
        return f"{type(error).__name__}: {error}"
    raise AssertionError("saving should fail")


def wait_for_the_first(seconds: float) -> tuple[float, str | None]:
    """Seconds that this process waited for the first one's work, and what came of it."""
    world, start = make_mesh(1, timedelta(seconds=3)).world, time.monotonic()
    done = on_first(world, lambda: time.sleep(seconds) or "done")
    # They still understand each other.
    world.all_reduce(torch.ones(1), "test")
    return time.monotonic() - start, done


def wait_for_a_first_that_dies(folder: Path) -> None:
    """Have the first process die at work; the others leave a note of their error's time."""
    world, start = make_mesh(1).world, time.monotonic()
    try:
        on_first(world, lambda: os._exit(1))
    except RuntimeError:
        write_whole(folder / "seconds", str(time.monotonic() - start))

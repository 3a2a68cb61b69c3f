"""Costs of a training step on this process, for tests."""

from collections import Counter
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from distributed.work import (
    mesh_of,
    part_of,
    scale_sae_of_one_owner,
    trainer_config,
)
from helpers import draw, scale_sae, step_input
from memory import peak_bytes
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_scale import ScaleTrainingSAE
from sae_lens_scale.distributed.sae import distribute
from sae_lens_scale.distributed.trainer import DistributedTrainer


def state_bytes(trainer: SAETrainer[Any, Any]) -> int:
    """Bytes of weights, gradients and Adam's moments."""
    parameters = list(trainer.sae.parameters())
    # Of the optimizer's, which may be slices of the SAE's.
    (group,) = trainer.optimizer.param_groups
    owners = {id(p): p for p in [*parameters, *group["params"]]}.values()
    gradients = [p.grad for p in owners if p.grad is not None]
    states = trainer.optimizer.state.values()
    moments = [v for state in states for v in state.values() if v.dim()]
    return sum(t.nbytes for t in [*parameters, *gradients, *moments])


def cost_of_step(
    overrides: dict[str, Any],
    tokens: int,
    expert_parallel: int,
    dead: float = 0.0,
) -> dict[str, Any]:
    """
    A step of the trainer on random tokens.

    Args:
        overrides: Fields of the SAE's config.
        tokens: Tokens of each process.
        expert_parallel: Processes that share out the experts.
        dead: Share of each expert's latents that is dead before the step.

    Returns:
        Bytes sent and numbers of collectives, by purpose; bytes of the state when the
        optimizer has made its step.
    """
    mesh = mesh_of(expert_parallel)
    sae = distribute(scale_sae(**overrides), mesh)
    cfg = sae.cfg
    batch = draw(mesh.world.size * tokens, cfg.d_in).to(sae.dtype)
    trainer = DistributedTrainer(
        trainer_config(train_batch_size_samples=len(batch)), sae, iter(())
    )
    # The first step starts the router and b_dec.
    trainer.step(part_of(batch, None, mesh))
    offsets = torch.arange(cfg.d_sae) % cfg.expert_size
    is_dead = offsets < dead * cfg.expert_size
    trainer.n_forward_passes_since_fired = is_dead.float()
    memory: list[int] = []
    trainer.optimizer.register_step_post_hook(
        lambda *_: memory.append(state_bytes(trainer))
    )
    groups = (mesh.world, mesh.experts, mesh.replicas)
    for group in groups:
        group.sent.clear()
        group.calls.clear()
    trainer.step(part_of(batch, None, mesh))
    return {
        "sent": sum((group.sent for group in groups), Counter()),
        "calls": sum((group.calls for group in groups), Counter()),
        "memory": memory[0],
    }


def memory_of_owners(
    overrides: dict[str, Any], tokens: int, dead: float, folder: Path
) -> int:
    """
    Memory of a forward and backward pass of an SAE whose tokens all choose its last experts.

    Args:
        overrides: Fields of the SAE's config.
        tokens: Tokens of each process.
        dead: Share of each expert's latents that is dead.
        folder: Folder for traces.

    Returns:
        The most bytes that this process's allocator holds at once, beyond those before.
    """
    mesh = mesh_of(2)
    sae = distribute(scale_sae_of_one_owner(**overrides), mesh)
    x = draw(tokens, sae.cfg.d_in).to(sae.dtype)
    offsets = torch.arange(sae.cfg.d_sae) % sae.cfg.expert_size
    step = step_input(x, offsets < dead * sae.cfg.expert_size)
    return peak_bytes(
        lambda: sae.training_forward_pass(step).loss.backward(),
        folder / f"{mesh.world.rank}.json",
    )


def state_bytes_of_one(overrides: dict[str, Any]) -> int:
    """The same bytes of one process that trains alone."""
    sae = scale_sae(**overrides)
    trainer = SAETrainer(trainer_config(), sae, iter(()))
    memory: list[int] = []
    trainer.optimizer.register_step_post_hook(
        lambda *_: memory.append(state_bytes(trainer))
    )
    trainer.step(draw(96, sae.cfg.d_in).to(sae.dtype))
    return memory[0]


def memory_of_start(overrides: dict[str, Any], folder: Path) -> tuple[int, int]:
    """
    Memory that this process needs for its part of a new SAE.

    Args:
        overrides: Fields of the SAE's config.
        folder: Folder for traces.

    Returns:
        Bytes of its weights; the most bytes that its allocator holds at once, beyond those
        before, which on the first process are the whole SAE's.
    """
    mesh = mesh_of(2)
    cfg = scale_sae(**overrides).cfg
    cfg.device = "meta" if mesh.world.rank else "cpu"
    sae = ScaleTrainingSAE(cfg)
    sae.device = torch.device("cpu")
    peak = peak_bytes(lambda: distribute(sae, mesh), folder / f"{mesh.world.rank}.json")
    return sum(p.nbytes for p in sae.parameters()), peak


def _anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    status = Path("/proc/self/status").read_text()
    (line,) = (li for li in status.splitlines() if li.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def memory_of_checkpoints(
    overrides: dict[str, Any], folder: Path
) -> tuple[int, int, int]:
    """
    Memory that saving a checkpoint, and going on from it, needs on this process.

    Args:
        overrides: Fields of the SAE's config.
        folder: Folder for the checkpoint.

    Returns:
        Bytes of its weights; the most bytes, beyond those before, that are no file's while it
        saves, and while it loads the state of the optimizer.
    """
    mesh = mesh_of(2)
    sae = distribute(scale_sae(**overrides), mesh)
    x = draw(16, sae.cfg.d_in).to(sae.dtype)
    trainer = DistributedTrainer(trainer_config(), sae, iter(()))
    trainer.step(x)
    peaks = []
    # Twice: what is made once is none of a checkpoint's.
    for name in ("0", "1"):
        for action in (
            lambda name=name: trainer.save_checkpoint(name, folder),
            lambda name=name: trainer.load_trainer_state(folder / name),
        ):
            if len(peaks) % 2:
                trainer.optimizer.state.clear()
            before, samples, done = _anonymous_bytes(), [0], Event()

            def watch(samples: list[int] = samples, done: Event = done) -> None:
                while not done.wait(0.002):
                    samples.append(_anonymous_bytes())

            watcher = Thread(target=watch)
            watcher.start()
            action()
            done.set()
            watcher.join()
            peaks.append(max(samples) - before)
    return sum(p.nbytes for p in sae.parameters()), *peaks[2:]

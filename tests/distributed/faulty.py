"""
Run ``sae-lens-scale`` as one of several processes, some of which have faults.

    torchrun faulty.py FAULTS ARGUMENTS

``FAULTS`` is JSON: ``folder``, to which each process writes what became of it, and
``faults``, each with its ``rank``, ``kind``, number of ``tokens`` that have been trained on
before, and ``life`` (0 before a restart).
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_scale.cli import main
from sae_lens_scale.distributed.data_parallel import DataParallelSAE
from sae_lens_scale.distributed.trainer import DistributedTrainer

SIGNALS = {"kill": signal.SIGKILL, "hang": signal.SIGSTOP, "term": signal.SIGTERM}
# Smaller than the SAE's weights.
DISK = 10_000


class Faults:
    """Faults of this process, and its notes of how far it came."""

    def __init__(self, folder: str, faults: list[dict[str, Any]]):
        rank = os.environ["RANK"]
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._notes = Path(folder, f"{life}-{rank}.json")
        self._faults = [
            fault
            for fault in faults
            if (str(fault["rank"]), str(fault.get("life", 0))) == (rank, life)
        ]
        self.notes: dict[str, Any] = {"pid": os.getpid(), "tokens": []}

    def note(self, **values: Any) -> None:
        """Leave notes in a file, which is whole whenever it is read."""
        self.notes |= values
        new = self._notes.with_suffix(".new")
        new.write_text(json.dumps(self.notes))
        new.replace(self._notes)

    def due(self, tokens: int) -> set[str]:
        """Kinds of the faults after so many tokens."""
        return {fault["kind"] for fault in self._faults if fault["tokens"] == tokens}


def inject(faults: Faults) -> None:
    """Have this process's training steps and checkpoints go wrong."""
    step = DistributedTrainer.step
    forward = DataParallelSAE.training_forward_pass
    save = DistributedTrainer.save_checkpoint
    save_state = SAETrainer.save_trainer_state

    def noting(self: Any, batch: torch.Tensor) -> Any:
        faults.note(tokens=[*faults.notes["tokens"], self.n_training_samples])
        return step(self, batch)

    def faulty_forward(self: Any, step_input: TrainStepInput) -> Any:
        due = faults.due(faults.notes["tokens"][-1])
        if "nan" in due:
            step_input.sae_in[0, 0] = float("nan")
        output = forward(self, step_input)
        for kind in due & SIGNALS.keys():
            os.kill(os.getpid(), SIGNALS[kind])
        if "term torchrun" in due:
            os.kill(os.getppid(), signal.SIGTERM)
        if "late" in due:
            time.sleep(1)
        if "full disk" in due:
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (DISK, limit))
        return output

    def faulty_save(self: Any, *args: Any, **kwargs: Any) -> None:
        if "signal while saving" in faults.due(self.n_training_samples):
            os.kill(os.getpid(), signal.SIGINT)
        save(self, *args, **kwargs)

    def faulty_save_state(self: Any, checkpoint_path: Path) -> None:
        # Weights are there already.
        if "killed while saving" in faults.due(self.n_training_samples):
            os.kill(os.getpid(), signal.SIGKILL)
        save_state(self, checkpoint_path)

    DistributedTrainer.step = noting
    DataParallelSAE.training_forward_pass = faulty_forward
    DistributedTrainer.save_checkpoint = faulty_save
    SAETrainer.save_trainer_state = faulty_save_state


if __name__ == "__main__":
    notes = Faults(**json.loads(sys.argv[1]))
    inject(notes)
    notes.note()
    notes.note(status=(status := main(sys.argv[2:])))
    sys.exit(status)

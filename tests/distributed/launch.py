"""Launching of the training command under torchrun, for tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Of each of its processes, in seconds.
TIMEOUT = "60"


def torchrun(
    processes: int,
    command: str,
    *options: str,
    program: tuple[str, ...] = ("-m", "sae_lens_scale"),
) -> subprocess.Popen[str]:
    """Start a command on several processes; options are torchrun's."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [
            *run,
            f"--nproc-per-node={processes}",
            *options,
            *program,
            "train",
            "--process_timeout",
            TIMEOUT,
            *command.split()[1:],
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            # torchrun 2.13 cannot restart processes without it.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    """Wait for a launch, check its exit status, and return what it printed: out and err."""
    try:
        out, err = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        # To its processes, too.
        process.terminate()
        raise
    assert process.returncode == status, err
    return out, err


def checkpoints(output: Path) -> list[Path]:
    """Checkpoints, the earliest first."""
    found = output.glob("checkpoints/*/*")
    return sorted(found, key=lambda path: int(path.name.removeprefix("final_")))

"""Settings of the GPU benchmark, and the precisions that it measures in."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/gpu.json"

Precision = Literal["float32", "tf32", "bfloat16", "autocast"]

# Spacing of the numbers that are multiplied: twice the error of rounding, once that of cutting off.
EPS: dict[Precision, float] = {
    "float32": torch.finfo(torch.float32).eps,
    "tf32": 2.0**-10,
    "bfloat16": torch.finfo(torch.bfloat16).eps,
    "autocast": torch.finfo(torch.bfloat16).eps,
}


@dataclass
class Args:
    """Check and time everything that runs on a GPU, in minutes."""

    device: str = "cuda"  # or cpu, with --quick
    batch: int = 8192  # tokens per step
    d_in: int = 768  # width of the language model's activations
    d_sae: int = 24_576  # latents; a multiple of 256
    k: int = 32  # latents kept per token
    repeats: int = 20  # timed rounds
    seconds: float = 460  # to end after; the next start goes on with what is missing
    parts: list[str] = field(default_factory=list)  # which to run; all if none is named
    quick: bool = False  # tiny sizes, to see that it runs; results go to outputs/
    output: Path | None = None  # JSON; benchmarks/results/gpu.json

    def __post_init__(self) -> None:
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(
                f"device must be one of torch's, got {self.device}"
            ) from error
        if self.quick:
            self.batch, self.d_in, self.d_sae, self.k = 4, 16, 256, 2
            self.repeats = 1
        elif not self.on_gpu:
            raise ValueError(f"device must be a GPU without --quick, got {self.device}")
        if self.d_sae % 256:
            raise ValueError(f"d_sae must be a multiple of 256, got {self.d_sae}")
        for name in ("batch", "d_in", "k", "repeats", "seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        quick = ROOT / "outputs/quick/gpu.json"
        self.output = self.output or (quick if self.quick else RESULTS)

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"


def without_interpreter() -> None:
    """Use plain PyTorch from now on where Triton's kernels would be interpreted."""
    os.environ.pop("TRITON_INTERPRET", None)

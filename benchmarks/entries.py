"""
The SAEs that are compared, with the FLOPs and bytes of a training step of each.

FLOPs are those of products with tokens (a multiply-add is two), as each implementation
computes them: :mod:`reproduction.flops` has the formulas. sparsify's forward pass
is that of a sparse TopK SAE, d_sae + k for each token and each of d_in; its backward pass is
sparse in the encoder, too, 4 k.

Bytes are a lower bound: both weight matrices read in each pass and their gradients
written; every tensor that is S, A or N wide written and read once; a row of d_in read for
each kept latent and sparse product; four times [tokens, d_in]. Dead latents, norms,
gradient clipping and Adam are not in it.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from gpu_settings import Precision
from machine import Run, Stopwatch
from sae_lens.saes.sae import SAE, TrainingSAE, TrainingSAEConfig, TrainStepInput

# The formulas of FLOPs are the laboratory's.
sys.path.insert(0, str(Path(__file__).parents[1]))

from reproduction.flops import flops_per_token

Kind = Literal["scale", "switch", "topk", "topk sparse", "sparsify"]

FORWARD_BACKWARD = ("forward", "backward")
WHOLE_STEP = ("forward", "statistics", "backward", "update")


@dataclass(frozen=True)
class Placement:
    """Device and precision of SAEs; autocast is SAELens's trainer's."""

    device: str
    dtype: str
    autocast: bool

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")

    @property
    def kind(self) -> str:
        return torch.device(self.device).type

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.torch_dtype)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def autocasting(self) -> contextlib.AbstractContextManager[object]:
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.kind, dtype=torch.bfloat16)


def placement(precision: Precision, device: str) -> Placement:
    """Device and precision of SAEs; lets float32 products use TF32, or keeps them from it."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    dtype = "bfloat16" if precision == "bfloat16" else "float32"
    return Placement(device, dtype, autocast=precision == "autocast")


@dataclass(frozen=True)
class Entry:
    """
    An SAE to measure.

    ``dead`` is the share of its latents that count as dead; ``multi_topk`` is whether it has the
    Multi-TopK loss, as by default.
    """

    name: str
    kind: Kind
    d_in: int
    d_sae: int
    k: int
    num_experts: int = 1
    experts_per_token: int = 1
    dead: float = 0.0
    multi_topk: bool = False

    @property
    def is_ours(self) -> bool:
        return self.kind in ("scale", "switch")

    @property
    def active(self) -> int:
        """Number of latents that are computed for each token."""
        return self.experts_per_token * self.d_sae // self.num_experts

    @cached_property
    def dead_mask(self) -> torch.Tensor:
        """Mask of the latents that count as dead, ``[d_sae]``."""
        mask = torch.zeros(self.d_sae, dtype=torch.bool)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(self.d_sae, generator=generator)
        mask[order[: round(self.dead * self.d_sae)]] = True
        return mask

    def flops(self, tokens: int) -> dict[str, int]:
        """FLOPs of products with tokens in each pass of a training step."""
        if self.kind == "sparsify":
            per_token = 2 * self.d_in * (self.d_sae + self.k), 8 * self.d_in * self.k
        else:
            dead = int(self.dead_mask.view(self.num_experts, -1).sum(-1).max())
            place = Placement("cpu", "float32", autocast=False)
            counted = flops_per_token(self.training_config(place), dead)
            per_token = counted.forward, counted.backward
        return dict(zip(FORWARD_BACKWARD, (tokens * n for n in per_token), strict=True))

    def least_bytes(self, tokens: int, element_size: int) -> int:
        """Bytes that a training step has to read from memory and to write to it."""
        # Columns of wide tensors, and sparse products.
        columns, gathers = {
            "topk": (4 * self.d_sae, 0),
            "topk sparse": (3 * self.d_sae, 2),
            "sparsify": (self.d_sae, 5),
            "scale": (self.active + 4 * self.num_experts, 4),
            "switch": (self.active + 4 * self.num_experts, 4),
        }[self.kind]
        per_token = 2 * columns + gathers * self.k * self.d_in + 4 * self.d_in
        weights = 2 * self.d_in * self.d_sae
        return element_size * (3 * weights + tokens * per_token)

    def peak_bound(self, tokens: int, element_size: int) -> int:
        """Bytes of three tensors as wide as the active latents, the kept ones and the input."""
        return 3 * tokens * (self.active + self.k + self.d_in) * element_size

    def config(self, place: Placement) -> dict[str, Any]:
        """SAELens's config, for inference too."""
        config: dict[str, Any] = {
            "architecture": self.kind.split()[0],
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "k": self.k,
            "device": place.device,
            "dtype": place.dtype,
        }
        if self.is_ours:
            config["num_experts"] = self.num_experts
        if self.kind == "scale":
            config["experts_per_token"] = self.experts_per_token
        return config

    def training_config(self, place: Placement) -> TrainingSAEConfig:
        config = self.config(place)
        if self.is_ours:
            # The start is no part of a step.
            config["initialize_from_activations"] = False
            if not self.multi_topk:
                config["multi_topk_coefficient"] = 0.0
        if self.kind == "topk sparse":
            # Rescaling fails in SAELens's sparse backward pass.
            config["rescale_acts_by_decoder_norm"] = False
            config["use_sparse_activations"] = True
        return TrainingSAEConfig.from_dict(config)


# Name of the SAE that users train by default.
DEFAULT = "scale 256/8, Multi-TopK"


def default_entry(d_in: int, d_sae: int, k: int) -> Entry:
    """The SAE that users train by default."""
    return Entry(DEFAULT, "scale", d_in, d_sae, k, 256, 8, multi_topk=True)


def comparison(d_in: int, d_sae: int, k: int) -> tuple[list[Entry], list[Entry]]:
    """The SAEs to compare at one width, and the same for those too expensive to run often."""

    def scale(num_experts: int, experts_per_token: int) -> Entry:
        name = f"scale {num_experts}/{experts_per_token}"
        return Entry(name, "scale", d_in, d_sae, k, num_experts, experts_per_token)

    reference, default = scale(64, 2), default_entry(d_in, d_sae, k)
    small = Entry(f"TopK {reference.active:,}", "topk", d_in, reference.active, k)
    cheap = [
        reference,
        scale(64, 8),
        scale(256, 8),
        default,
        Entry("switch 32", "switch", d_in, d_sae, k, 32),
        small,
        *(replace(e, name=f"{e.name}, 5% dead", dead=0.05) for e in (reference, small)),
    ]
    expensive = [
        reference,
        default,
        small,
        Entry(f"TopK {d_sae:,}, dense activations", "topk", d_in, d_sae, k),
        Entry(f"TopK {d_sae:,}, sparse activations", "topk sparse", d_in, d_sae, k),
        Entry(f"sparsify {d_sae:,}", "sparsify", d_in, d_sae, k),
    ]
    return cheap, expensive


class TrainingRun:
    """Training steps of an SAE on one batch, as SAELens's trainer takes them."""

    def __init__(
        self, entry: Entry, x: torch.Tensor, place: Placement, fused: bool = False
    ):
        self.x, self.place = x, place
        self.dead_mask = entry.dead_mask.to(place.device)
        make = _sparsify if entry.kind == "sparsify" else _training_sae
        self.sae: Any
        self.loss: Loss
        self.sae, self.loss = make(entry, place)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=1e-4, fused=fused)
        self.steps_since_fired = torch.zeros(entry.d_sae, device=place.device)
        self.firing_counts = torch.zeros(entry.d_sae, device=place.device)

    def __call__(self, watch: Stopwatch) -> None:
        """A step, with a lap for each of its parts."""
        with self.place.autocasting():
            loss, fired = self.loss(self.x, self.dead_mask)
            watch.lap("forward")
            self._count_firing(fired)
            watch.lap("statistics")
        loss.backward()
        watch.lap("backward")
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        watch.lap("update")

    def forward_backward(self) -> None:
        """A forward and backward pass, for measuring memory; leaves gradients behind."""
        with self.place.autocasting():
            loss, _ = self.loss(self.x, self.dead_mask)
        loss.backward()

    @torch.no_grad()
    def _count_firing(self, fired: torch.Tensor) -> None:
        # SAETrainer._train_step's lines; sparsify's trainer has indices.
        self.steps_since_fired += 1
        if fired.dtype == torch.int64:
            self.steps_since_fired[fired.flatten()] = 0
            return
        firing = fired.bool().float()
        did_fire = firing.sum(-2).bool()
        if did_fire.is_sparse:
            did_fire = did_fire.to_dense()
        self.steps_since_fired[did_fire] = 0
        self.firing_counts += firing.sum(0)


# Maps a batch and a mask of dead latents to the loss and the activations.
Loss = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _training_sae(entry: Entry, place: Placement) -> tuple[torch.nn.Module, Loss]:
    sae = TrainingSAE.from_dict(entry.training_config(place).to_dict())

    def loss(x: torch.Tensor, dead: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = sae.training_forward_pass(
            TrainStepInput(
                sae_in=x,
                coefficients={},
                dead_neuron_mask=dead,
                n_training_steps=0,
                is_logging_step=False,
            )
        )
        return output.loss, output.feature_acts

    return sae, loss


def _sparsify(entry: Entry, place: Placement) -> tuple[torch.nn.Module, Loss]:
    if place.kind == "cpu":
        # Its kernels are for GPUs, but chosen wherever triton is installed.
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import (  # pyright: ignore[reportMissingImports]
        SparseCoder,
        SparseCoderConfig,
    )

    config = SparseCoderConfig(num_latents=entry.d_sae, k=entry.k)
    coder = SparseCoder(entry.d_in, config, place.device, place.torch_dtype)

    def loss(x: torch.Tensor, dead: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = coder(x, dead_mask=dead)
        return output.fvu, output.latent_indices

    return coder, loss


def inference_run(entry: Entry, batches: list[torch.Tensor], place: Placement) -> Run:
    """Make a run that reconstructs one batch after another, in both of SAELens's ways."""
    sae = SAE.from_dict(entry.config(place))
    calls = 0

    @torch.no_grad()
    def run(watch: Stopwatch) -> None:
        nonlocal calls
        x = batches[calls % len(batches)]
        calls += 1
        with place.autocasting():
            sae.decode(sae.encode(x))
            watch.lap("decode(encode(x))")
            sae(x)
            watch.lap("forward")

    return run

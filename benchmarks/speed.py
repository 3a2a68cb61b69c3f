"""
Time and memory of training and inference on a CPU, beside the ceilings of the machine; gpu.py
measures on a GPU.

    python benchmarks/speed.py                            # all parts, minutes
    python benchmarks/speed.py --parts step --repeats 31

Parts:

- ``step``: training steps beside SAELens's TopK SAE and sparsify's, at equal width and, for
  TopK, at equal active latents.
- ``inference``: ``decode(encode(x))`` and ``forward``.
- ``scaling``: steps of wider and wider SAEs with the same active latents per token, beside
  the parts that have to be linear in the width: writing the gradients, and the optimizer.
  And one SAE of a million latents.
- ``memory``: the memory of one forward and backward pass beyond parameters and gradients.
- ``machine``: speed of matrix products and memory here; ceilings for all the others.

SAEs are compared within one process and in turns: a machine that slows down does so for
all. An SAE that takes seconds and allocates gigabytes at every step leaves caches cold, and
pages and clock rates changed, for the SAE after it. So those form a second group, with
fewer rounds, in which the two references run, too: ratios are taken within a group, and
how the references differ between the groups shows how much neighbours matter.

Times are medians over the rounds, after a round that is not timed; where they are far above
the least, look for other processes, and at the CPU time: below cores times wall time, cores
were taken or idle. Memory that is freed in between returns to the system, which may take
its time to provide it again: tensors as wide as d_sae pay for that. "whole step" is forward,
the trainer's firing statistics, backward, gradient clipping, Adam and zero_grad; sparsify
is given the same optimizer, without its own trainer's work on decoder norms. Inputs are random
and so are weights: routing is nearly balanced. entries.py describes the FLOPs and bytes that are counted.

Each part replaces its own results in the file and leaves those of the others.
"""

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from entries import (
    FORWARD_BACKWARD,
    Entry,
    Placement,
    TrainingRun,
    comparison,
    inference_run,
)
from machine import (
    UNAVAILABLE,
    Run,
    Stopwatch,
    available_memory,
    ceilings,
    context,
    interleave,
    peak_bytes,
    peak_rss,
    python_peak_bytes,
    read_json,
    summary,
    torch_allocations,
    write_json,
)
from simple_parsing import parse
from tables import speed_tables

ROOT = Path(__file__).parents[1]
DEVICE = "cpu"


@dataclass
class Args:
    """Measure speed and memory of SAEs."""

    parts: list[str] = field(default_factory=lambda: list(PARTS))  # which to run
    batch: int = 4096  # tokens per step
    d_in: int = 768  # width of the language model's activations
    d_sae: int = 24_576  # latents; a multiple of 256
    k: int = 32  # latents kept per token
    repeats: int = 15  # timed rounds
    repeats_expensive: int = 3  # timed rounds of SAEs that take seconds per step
    tokens: int = 100_000  # tokens of inference
    dtype: str = "float32"  # of the weights; or bfloat16
    threads: int = 0  # threads of torch; 0 leaves its default
    million: bool = True  # whether scaling includes a million latents
    quick: bool = False  # tiny sizes, to see that it runs; results go to outputs/
    output: Path | None = None  # JSON; benchmarks/results/speed-cpu.json
    plot: Path | None = None  # picture of scaling; docs/images/scaling.png

    def __post_init__(self) -> None:
        unknown = sorted(set(self.parts) - set(PARTS))
        if unknown:
            raise ValueError(f"parts must be among {sorted(PARTS)}, got {unknown}")
        if self.quick:
            self.batch, self.d_in, self.d_sae, self.k = 64, 32, 2048, 8
            self.repeats, self.repeats_expensive, self.tokens = 2, 1, 256
        if min(self.repeats, self.repeats_expensive) < 1:
            raise ValueError("repeats must be at least 1")
        results, images = ROOT / "benchmarks/results", ROOT / "docs/images"
        if self.quick:
            results = images = ROOT / "outputs/quick"
        self.output = self.output or results / "speed-cpu.json"
        self.plot = self.plot or images / "scaling.png"

    @property
    def place(self) -> Placement:
        return Placement(DEVICE, self.dtype, autocast=False)

    @property
    def groups(self) -> dict[str, tuple[list[Entry], int]]:
        cheap, expensive = comparison(self.d_in, self.d_sae, self.k)
        return {
            "main": (cheap, self.repeats),
            "expensive": (expensive, self.repeats_expensive),
        }


def step(args: Args) -> dict[str, Any]:
    x = args.place.randn(args.batch, args.d_in)
    result = {}
    for name, (entries, rounds) in args.groups.items():
        result[name] = _compare(
            entries,
            rounds,
            f"step, {name}",
            lambda e: TrainingRun(e, x, args.place),
        )
        for entry in entries:
            result[name][entry.name] |= {
                "flops": entry.flops(args.batch),
                "least_bytes": entry.least_bytes(args.batch, x.element_size()),
            }
    return result


def inference(args: Args) -> dict[str, Any]:
    batches = [
        args.place.randn(args.batch, args.d_in)
        for _ in range(-(-args.tokens // args.batch))
    ]
    result = {}
    for name, (entries, rounds) in args.groups.items():
        entries = [
            e
            for e in entries
            if not (e.dead or e.multi_topk or e.kind in NOT_FOR_INFERENCE)
        ]
        # Every batch once; some batches for expensive SAEs.
        rounds = len(batches) if name == "main" else rounds
        result[name] = _compare(
            entries,
            rounds,
            f"inference, {name}",
            lambda e: inference_run(e, batches, args.place),
        )
    return result


# Inference knows one TopK only, and sparsify's is the forward pass of its training.
NOT_FOR_INFERENCE = ("topk sparse", "sparsify")


def _compare(
    entries: Sequence[Entry],
    rounds: int,
    label: str,
    start: Callable[[Entry], Run],
) -> dict[str, Any]:
    return interleave(
        {e.name: lambda e=e: start(e) for e in entries},
        rounds,
        DEVICE,
        label,
        optional=[e.name for e in entries if not e.is_ours],
    )


def wider(args: Args) -> list[Entry]:
    """Scale SAEs of ever more experts that are 1/64 of d_sae each, two of them active."""
    size = args.d_sae // 64
    return [
        Entry(f"scale {n}/2", "scale", args.d_in, n * size, args.k, n, 2)
        for n in (16, 32, 64, 128, 256)
    ]


def scaling(args: Args) -> dict[str, Any]:
    entries = wider(args)
    x = args.place.randn(args.batch, args.d_in)
    # As much memory as the widest gradients take.
    buffer = args.place.randn(2 * entries[-1].d_sae, args.d_in)
    result = {
        "widths": _compare(
            entries,
            args.repeats,
            "scaling",
            lambda e: _with_linear_part(
                TrainingRun(e, x, args.place), buffer[: 2 * e.d_sae]
            ),
        )
    }
    for entry in entries:
        result["widths"][entry.name]["d_sae"] = entry.d_sae
    del buffer
    if args.million:
        result["million"] = _million(args)
    plot_scaling(entries, result["widths"], args)
    return result


def _with_linear_part(run: TrainingRun, gradients: torch.Tensor) -> Run:
    """Make a run of a step, its router alone, and a write as large as its gradients."""

    def timed(watch: Stopwatch) -> None:
        run(watch)
        with run.place.autocasting():
            probabilities = run.sae.route(run.x).probabilities
        probabilities.square().sum().backward()
        watch.lap("router")
        run.optimizer.zero_grad()
        gradients.zero_()
        watch.lap("fill, reused memory")
        torch.empty_like(gradients).zero_()
        watch.lap("fill, fresh memory")

    return timed


def _million(args: Args) -> dict[str, Any]:
    """Time steps of a million latents, if there is memory for them."""
    entry = Entry("scale 4,096/3", "scale", 256, 1 << 20, 32, 4096, 3)
    if args.quick:
        entry = replace(entry, d_in=16, d_sae=1 << 12, k=8, num_experts=64)
    weights = 2 * entry.d_in * entry.d_sae * args.place.torch_dtype.itemsize
    # Parameters, gradients, two moments, and two temporaries of Adam.
    needed, available = 5 * weights + (1 << 30), available_memory(DEVICE)
    record: dict[str, Any] = {"entry": asdict(entry)}
    if available < needed:
        reason = f"needs {needed / 1e9:.0f} GB, {available / 1e9:.0f} GB are available"
        return {**record, "missing": reason}
    x = args.place.randn(args.batch, entry.d_in)

    def run() -> None:
        start = lambda e: TrainingRun(e, x, args.place)
        laps = _compare([entry], args.repeats_expensive, "a million latents", start)
        record.update(laps[entry.name])

    rss = peak_rss(run)
    return {**record, "peak_rss": rss and rss[1]}


def plot_scaling(entries: list[Entry], records: dict[str, Any], args: Args) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no picture of scaling")
        return
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.subplots()
    lines = {
        "forward + backward": (FORWARD_BACKWARD, "o-"),
        "of which router, forward + backward": (("router",), "s--"),
        "gradient clipping and Adam": (("update",), "^-"),
        "writing the gradients' size, fresh memory": (("fill, fresh memory",), "v:"),
        "writing the gradients' size, reused memory": (("fill, reused memory",), "x:"),
    }
    for label, (names, style) in lines.items():
        times = [
            1e3 * summary(records[e.name]["laps"], *names)["median"] for e in entries
        ]
        axes.plot([e.d_sae for e in entries], times, style, label=label, markersize=5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(
        [e.d_sae for e in entries], [f"{e.d_sae:,}\n{e.num_experts}" for e in entries]
    )
    axes.set_xlabel("latents, and experts")
    axes.set_ylabel("milliseconds per step")
    axes.set_title(
        f"Scale SAE, {entries[0].active} active latents per token, "
        f"{args.batch:,} tokens, d_in {args.d_in}, {DEVICE}",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    assert args.plot is not None
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.plot, dpi=150)


def memory(args: Args) -> dict[str, Any]:
    x = args.place.randn(args.batch, args.d_in)
    entries = {e.name: e for group, _ in args.groups.values() for e in group}
    records = {}
    for name, entry in entries.items():
        print(f"memory: {name}", flush=True)
        try:
            records[name] = _memory_of(entry, x, args)
        except UNAVAILABLE as error:
            if entry.is_ours:
                raise
            records[name] = {"missing": f"{type(error).__name__}: {error}"}
        gc.collect()
    return records


def _memory_of(entry: Entry, x: torch.Tensor, args: Args) -> dict[str, Any]:
    """
    Measure the peak of a forward and backward pass in bytes, without parameters' gradients.

    The pass before has filled the pool that our gradients take their memory from, so that
    NumPy's allocations from then on are temporaries.
    """
    run = TrainingRun(entry, x, args.place)
    run.forward_backward()
    run.optimizer.zero_grad()
    outside_torch = python_peak_bytes(run.forward_backward)
    run.optimizer.zero_grad()
    events = torch_allocations(run.forward_backward)
    gradients = [p.grad for p in run.sae.parameters() if p.grad is not None]
    in_torch = peak_bytes(events, {g.untyped_storage().data_ptr() for g in gradients})
    run.optimizer.zero_grad()
    del gradients
    record: dict[str, Any] = {
        "peak_in_torch": in_torch,
        "peak_outside_torch": outside_torch,
        "bound": entry.peak_bound(args.batch, x.element_size()),
    }
    rss = peak_rss(run.forward_backward)
    if rss is not None:
        record["rss_growth_with_gradients"] = rss[1] - rss[0]
    return record


def machine(args: Args) -> dict[str, Any]:
    side, nbytes = (128, 1 << 20) if args.quick else (4096, 1 << 29)
    return ceilings(DEVICE, args.repeats, side, nbytes)


PARTS: dict[str, Callable[[Args], dict[str, Any]]] = {
    "machine": machine,
    "step": step,
    "inference": inference,
    "scaling": scaling,
    "memory": memory,
}


def main() -> None:
    args = parse(Args)
    if args.threads:
        torch.set_num_threads(args.threads)
    path = args.output
    assert path is not None
    settings = {
        key: value
        for key, value in asdict(args).items()
        if key not in ("parts", "output", "plot")
    }
    read_json(path)  # A file that cannot be read is better known before than after.
    for part in args.parts:
        record = {"context": context(DEVICE), "settings": settings}
        torch.manual_seed(0)
        record["results"] = PARTS[part](args)
        write_json(path, {**read_json(path), part: record})
        for name, table in speed_tables({part: record}).items():
            print(f"\n{name}\n\n{table}", flush=True)


if __name__ == "__main__":
    main()

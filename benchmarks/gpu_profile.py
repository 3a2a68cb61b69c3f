"""Kernels of a training step by time, and where the step waits for the GPU."""

import linecache
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from entries import WHOLE_STEP, Entry, TrainingRun, default_entry, placement
from gpu_settings import ROOT, Args, Precision, without_interpreter
from machine import Stopwatch
from processes import Item
from torch.profiler import ProfilerActivity, profile

_STEPS = 3
# Calls of CUDA's runtime that wait, or that launch.
_CALLS = (
    "cudaLaunchKernel",
    "cudaMemcpyAsync",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
)


def profiles(args: Args) -> Iterator[Item]:
    without_interpreter()
    entry = default_entry(args.d_in, args.d_sae, args.k)
    for dead in (0.0, 0.05):
        some = replace(entry, name=f"{entry.name}, {dead:.0%} dead", dead=dead)
        name = f"host synchronisations, {dead:.0%} dead"
        yield name, partial(_synchronisations, some, args)
    precisions: list[Precision] = ["tf32", "autocast"]
    for precision in precisions:
        yield f"kernels, {precision}", partial(_kernels, entry, args, precision)


def _warm(entry: Entry, args: Args, precision: Precision) -> TrainingRun:
    place = placement(precision, args.device)
    torch.manual_seed(0)
    run = TrainingRun(entry, place.randn(args.batch, args.d_in), place, fused=True)
    for _ in range(2):
        run(Stopwatch(args.device))
    return run


def _synchronisations(entry: Entry, args: Args) -> dict[str, Any]:
    """Waits of a step for the GPU that torch notices, with the part and line of each."""
    run = _warm(entry, args, "tf32")
    found: list[dict[str, str]] = []
    watch = Stopwatch(args.device)

    def note(message: Warning | str, *_: Any) -> None:
        # Not what torch says of the mode itself.
        if "called a synchronizing" in str(message):
            frame = _frame_of_ours(traceback.extract_stack()[:-1])
            part = WHOLE_STEP[min(len(watch.names), len(WHOLE_STEP) - 1)]
            found.append({"part": part, **frame})

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if args.on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            run(watch)
        finally:
            if args.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
    return {"measured": args.on_gpu, "synchronisations": found}


def _frame_of_ours(stack: Sequence[traceback.FrameSummary]) -> dict[str, str]:
    """Line of the innermost frame that is the repository's, else of the innermost."""
    ours = [f for f in stack if f.filename.startswith(f"{ROOT}/")]
    if not stack:
        return {"line": "-", "code": "no Python: a backward pass of torch's"}
    frame = (ours or stack)[-1]
    file = frame.filename.removeprefix(f"{ROOT}/")
    code = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return {"line": f"{file}:{frame.lineno}", "code": code}


def _kernels(entry: Entry, args: Args, precision: Precision) -> dict[str, Any]:
    """Time, launches and share of each kernel, per step."""
    run = _warm(entry, args, precision)
    activities = [ProfilerActivity.CPU]
    if args.on_gpu:
        activities.append(ProfilerActivity.CUDA)
    watch = Stopwatch(args.device)
    with profile(activities=activities) as profiler:
        for _ in range(_STEPS):
            run(watch)
        # Laps of one name are the last step's.
        laps = watch.read()
    device = "CUDA" if args.on_gpu else "CPU"
    attribute = f"self_{'device' if args.on_gpu else 'cpu'}_time_total"
    averages = profiler.key_averages()
    spent = [
        (event.key, getattr(event, attribute) / 1e6 / _STEPS, event.count / _STEPS)
        for event in averages
        # Ranges that somebody named hold kernels, which are there themselves.
        if event.device_type.name == device and not event.is_user_annotation
    ]
    busy = sum(seconds for _, seconds, _ in spent)
    spent.sort(key=lambda kernel: -kernel[1])
    return {
        "step": sum(wall for wall, _ in laps.values()),
        "busy": busy,
        "launches": sum(count for *_, count in spent),
        "calls": {
            event.key: event.count / _STEPS for event in averages if event.key in _CALLS
        },
        "kernels": [
            {
                "kernel": name[:100],
                "seconds": seconds,
                "launches": count,
                "share": seconds / busy if busy else 0.0,
            }
            for name, seconds, count in spent[:25]
        ],
    }

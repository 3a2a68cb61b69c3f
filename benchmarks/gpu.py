"""
Everything that a GPU has to settle: correctness, speed and memory, in less than eight minutes.

    python benchmarks/gpu.py                          # on a GPU
    python benchmarks/gpu.py --quick --device cpu     # a dry run of all of it

It needs no network. Parts, the most important first:

- ``products, ...``, ``steps, ...``: every product and whole training steps against dense formulas
  in float64, in float32, with TF32, with bfloat16 weights and under bfloat16 autocast;
- ``machine``: speed of matrix products and memory here, the ceilings of what follows;
- ``times, ...``: training steps and inference beside SAELens's TopK SAE and sparsify's;
- ``profile``: kernels of a step by time, and the lines that make it wait for the GPU;
- ``kernels``: for each product, every function that could compute it;
- ``large``: steps of Scale SAEs of up to a million latents.

Each part runs in a process of its own. What a crash, an error or the end of the time costs is
reported, and the exit status is then 1, as it is where a check fails; all else still runs. Each
result is in the JSON file as soon as it is there, and a run that is started again goes on with what
is missing, unless sources, device or sizes have changed: then it starts anew, as without a file.
"""

import hashlib
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, SpawnContext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Asking CUDA itself in this process would make it useless in those that are forked.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch
from gpu_settings import RESULTS, ROOT, Args
from simple_parsing import parse

# Processes on a GPU at a time, where nothing is timed, and bytes of its memory for each.
_MOST_TOGETHER, _BYTES_EACH = 8, 8 << 30


def main() -> None:
    try:
        args = parse(Args)
    except ValueError as error:
        sys.exit(f"gpu.py: error: {error}")
    if args.on_gpu and not torch.cuda.device_count():
        sys.exit(
            f"gpu.py: error: device must be a GPU that torch {torch.__version__} sees, "
            f"got {args.device}; a dry run is --quick --device cpu"
        )
    if not args.on_gpu:
        # Read when Triton is imported; what is timed then goes without.
        os.environ["TRITON_INTERPRET"] = "1"
    deadline = time.monotonic() + args.seconds
    # Only now: it takes seconds, and one that cannot run is to end at once.
    from gpu_report import failures, page
    from machine import read_json, write_json
    from processes import Record, run_together
    from tables import renew_page
    from tqdm.auto import tqdm

    stages = parts()
    names = [part.name for stage in stages for part in stage]
    unknown = sorted(set(args.parts) - set(names))
    if unknown:
        sys.exit(f"gpu.py: error: parts must be among {names}, got {unknown}")
    wanted = args.parts or names
    context, facts = start_method(args)
    sizes = ("batch", "d_in", "d_sae", "k", "repeats", "quick")
    key = {
        "sources": sources(),
        "device": facts.get("gpu", args.device),
        "settings": {name: asdict(args)[name] for name in sizes},
    }
    path = args.output
    assert path is not None
    found = read_json(path)
    if found.get("key") != key:
        found = {"key": key, "results": {}, "complete": []}
    found["context"] = facts
    record = Record(
        found["results"], found["complete"], lambda: write_json(path, found)
    )
    together = facts.get("gpu_memory", 0) // _BYTES_EACH
    together = max(1, min(_MOST_TOGETHER, together))
    with tqdm(total=len(wanted), desc="bench-gpu", mininterval=0) as bar:
        for stage in stages:
            todo = [p for p in stage if p.name in wanted]
            bar.update(sum(p.name in record.complete for p in todo))
            todo = [p for p in todo if p.name not in record.complete]
            for first in range(0, len(todo), together):
                run_together(
                    todo[first : first + together], args, record, context, deadline, bar
                )
    unfinished = [name for name in wanted if name not in record.complete]
    print(page(found))
    failed = failures(record.results, unfinished)
    print(f"\n{len(failed)} failures", *failed, sep="\n- ")
    if path == RESULTS:
        renew_page()
    sys.exit(1 if failed else 0)


def parts() -> list[list[Any]]:
    """Parts in the order in which they run; those of one list at the same time."""
    from gpu_checks import check_products
    from gpu_profile import profiles
    from gpu_steps import check_steps
    from gpu_times import kernels, large, machine, times
    from processes import Part

    precisions = ("float32", "tf32", "bfloat16", "autocast")
    return [
        [
            Part(f"{name}, {precision}", partial(check, precision=precision), 150)
            for precision in precisions
            for name, check in (("products", check_products), ("steps", check_steps))
        ],
        [Part("machine", machine, 40)],
        *(
            [Part(f"times, {precision}", partial(times, precision=precision), 90)]
            for precision in ("tf32", "autocast")
        ),
        [Part("profile", profiles, 60)],
        [Part("kernels", kernels, 90)],
        [Part("large", large, 60)],
        [Part("times, float32", partial(times, precision="float32"), 90)],
    ]


def start_method(args: Args) -> tuple[ForkContext | SpawnContext, dict[str, Any]]:
    """
    Choose how to start processes, and describe the machine, as the first process that could use it
    does.

    A fork has all modules already. Where a module that was imported has made CUDA useless in
    forks, processes are started from nothing.
    """
    for context in (get_context("fork"), get_context("spawn")):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send_facts, args=(args.device, sender))
        process.start()
        sender.close()
        try:
            return context, receiver.recv()
        except EOFError:
            continue
        finally:
            process.join()
    sys.exit(f"gpu.py: error: no process could use device {args.device}; see above")


def _send_facts(device: str, pipe: Connection) -> None:
    from machine import context

    torch.ones(1, device=device).sum().item()
    pipe.send(context(device))


def sources() -> str:
    """A hash of the code that runs."""
    digest = hashlib.sha256()
    for folder in ("sae_lens_scale", "benchmarks"):
        for file in sorted(Path(ROOT, folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    main()

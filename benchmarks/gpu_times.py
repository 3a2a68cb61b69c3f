"""
Times and memory on a GPU: the machine's ceilings, training steps, inference, and each kernel beside
what could stand in for it.

A step is timed from event to event on the GPU's stream, in rounds that take turns, after one that is
not timed; it ends with a fused Adam. Inputs and weights are random, so that routing is nearly
balanced. sparsify has neither the optimizer nor the work on decoder norms of its own trainer, and is
under autocast in every precision. entries.py describes the FLOPs and bytes that are counted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from entries import (
    FORWARD_BACKWARD,
    WHOLE_STEP,
    Entry,
    Placement,
    TrainingRun,
    comparison,
    inference_run,
    placement,
)
from gpu_checks import Case
from gpu_settings import Args, Precision, without_interpreter
from machine import (
    Run,
    Stopwatch,
    available_memory,
    ceilings,
    interleave,
    summary,
)
from processes import Item

from sae_lens_scale.ops import SparsityPattern, torch_backend
from sae_lens_scale.ops.backend import backend_for


def machine(args: Args) -> Iterator[Item]:
    side, nbytes = (64, 1 << 16) if args.quick else (8192, 1 << 31)

    def measure() -> dict[str, Any]:
        found = ceilings(args.device, args.repeats, side, nbytes)
        return {name: {"per_second": r["per_second"]} for name, r in found.items()}

    yield "ceilings", measure


def compared(args: Args) -> dict[str, list[Entry]]:
    """SAEs to compare, by group: those of a group are timed in turns."""
    cheap, expensive = comparison(args.d_in, args.d_sae, args.k)
    return {"narrow": cheap, "wide": expensive}


def times(args: Args, precision: Precision) -> Iterator[Item]:
    without_interpreter()
    place = placement(precision, args.device)
    for group, entries in compared(args).items():
        yield f"steps, {group}", partial(_steps, entries, args.repeats, args, place)
    batches = [place.randn(args.batch, args.d_in) for _ in range(4)]
    entries = {
        entry.name: entry
        for group in compared(args).values()
        for entry in group
        if entry.kind in ("scale", "switch", "topk")
        and not (entry.dead or entry.multi_topk)
    }
    yield "inference", partial(_inference, [*entries.values()], batches, args, place)


def large(args: Args) -> Iterator[Item]:
    """Items: Scale SAEs of up to a million latents, of which a token has 768."""
    without_interpreter()
    sizes = [(64, 1 << 10)] if args.quick else [(512, 1 << 17), (4096, 1 << 20)]
    for experts, d_sae in sizes:
        for precision in ("tf32", "autocast"):
            entry = Entry(
                f"scale {experts:,}/3", "scale", args.d_in, d_sae, args.k, experts, 3
            )
            yield (
                f"{d_sae:,} latents, {precision}",
                partial(_large, entry, args, precision),
            )


def _large(entry: Entry, args: Args, precision: Precision) -> dict[str, Any]:
    place = placement(precision, args.device)
    # Parameters, gradients and Adam's two moments, and as much again for a pass.
    per_number = 8 * 2 * entry.d_sae * place.torch_dtype.itemsize
    widest = available_memory(args.device) // per_number
    # A multiple of what kernels read at a time.
    entry = replace(entry, d_in=min(entry.d_in, max(16, widest // 64 * 64)))
    return _steps([entry], max(1, args.repeats // 2), args, place)


def _steps(
    entries: Sequence[Entry], rounds: int, args: Args, place: Placement
) -> dict[str, Any]:
    x = place.randn(args.batch, entries[0].d_in)
    found = interleave(
        {e.name: lambda e=e: TrainingRun(e, x, place, fused=True) for e in entries},
        rounds,
        args.device,
        "steps",
        optional=[entry.name for entry in entries],
        errors=Exception,
    )
    return {
        entry.name: _step_record(entry, found[entry.name], args, place)
        for entry in entries
    }


def _step_record(
    entry: Entry, found: dict[str, Any], args: Args, place: Placement
) -> dict[str, Any]:
    if "laps" not in found:
        return _not_timed(found, entry.is_ours)
    parts: dict[str, tuple[str, ...]] = {name: (name,) for name in WHOLE_STEP}
    parts |= {"both": FORWARD_BACKWARD, "step": WHOLE_STEP}
    record: dict[str, Any] = {
        name: summary(found["laps"], *laps) for name, laps in parts.items()
    }
    return record | {
        "d_in": entry.d_in,
        "flops": sum(entry.flops(args.batch).values()),
        "least_bytes": entry.least_bytes(args.batch, place.torch_dtype.itemsize),
        "tokens_per_second": args.batch / record["step"]["median"],
        "peak_bytes": found.get("max_memory_allocated"),
    }


def _inference(
    entries: Sequence[Entry],
    batches: list[torch.Tensor],
    args: Args,
    place: Placement,
) -> dict[str, Any]:
    found = interleave(
        {e.name: lambda e=e: inference_run(e, batches, place) for e in entries},
        args.repeats,
        args.device,
        "inference",
        optional=[entry.name for entry in entries],
        errors=Exception,
    )
    return {
        entry.name: {lap: summary(record["laps"], lap) for lap in record["laps"]}
        if "laps" in (record := found[entry.name])
        else _not_timed(record, entry.is_ours)
        for entry in entries
    }


def _not_timed(found: dict[str, Any], is_ours: bool) -> dict[str, Any]:
    """Record of what cannot be timed: a failure, unless it is another package's."""
    return {"error": found["missing"]} if is_ours else found


# Functions of one product by name, each of no arguments.
Alternatives = dict[str, Callable[[], Any]]


def alternatives(case: Case, place: Placement) -> dict[str, Alternatives]:
    """Functions that could compute each product, as far as the backends have them."""
    N, n, d = case.num_experts, case.size, case.width
    tokens = len(case.experts)
    x, values = place.randn(tokens, d), place.randn(tokens, case.k)
    W_enc, W_dec = place.randn(d, case.d_sae), place.randn(case.d_sae, d)
    acts = place.randn(tokens, case.experts.shape[1], n)
    latents = SparsityPattern(case.latents(), case.d_sae).sorted()
    experts = SparsityPattern(case.experts, N).sorted()
    encoders = rearrange(W_enc, "d (N n) -> N d n", N=N)
    decoders = rearrange(W_dec, "(N n) d -> N d n", N=N)
    sums = torch.empty_like(W_dec)
    transposed_sums = torch.empty_like(W_enc).T
    backends = {"torch": torch_backend}
    chosen = backend_for(x)
    if chosen is not torch_backend:
        backends["Triton"] = chosen

    def with_each(product: str, *factors: Any) -> Alternatives:
        return {
            name: partial(getattr(backend, product), *factors)
            for name, backend in backends.items()
            if hasattr(backend, product)
        }

    def index_add(out: torch.Tensor) -> torch.Tensor:
        pairs = (values.unsqueeze(-1) * x.unsqueeze(1)).flatten(0, 1)
        return out.zero_().index_add_(0, latents.indices.flatten(), pairs)

    def sums_into(out: torch.Tensor) -> Alternatives:
        found = with_each("latent_sums", values, x, latents, out)
        return found | {"index_add": partial(index_add, out)}

    return {
        "sparse_decode": with_each("sparse_decode", values, W_dec, latents),
        "sampled_products": with_each("sampled_products", x, W_dec, latents),
        "latent_sums": sums_into(sums),
        "latent_sums, transposed": sums_into(transposed_sums),
        "grouped_encode": with_each("grouped_encode", x, encoders, experts),
        "grouped_decode": with_each("grouped_decode", acts, decoders, experts),
        "grouped_sums": with_each("grouped_sums", x, acts, experts),
    }


def kernels(args: Args) -> Iterator[Item]:
    """Items: a product in a precision each, of every function that computes it."""
    sizes = [(4, 2)] if args.quick else [(64, 2), (256, 8)]
    precisions: list[Precision] = ["float32", "tf32", "bfloat16"]
    for precision in precisions[: 1 if args.quick else None]:
        place = placement(precision, args.device)
        for num_experts, e in sizes:
            torch.manual_seed(0)
            scores = torch.rand(args.batch, num_experts, device=args.device)
            experts = scores.topk(e, dim=1).indices
            size = args.d_sae // num_experts
            case = Case(args.d_in, size, args.k, experts, num_experts)
            for product, found in alternatives(case, place).items():
                # Matrix products only are other ones with TF32.
                if precision == "tf32" and not product.startswith("grouped"):
                    continue
                name = f"{product}, {num_experts}/{e}, {precision}"
                yield name, partial(_race, found, args)


def _race(found: Alternatives, args: Args) -> dict[str, Any]:
    def timed(function: Callable[[], Any]) -> Run:
        def run(watch: Stopwatch) -> None:
            function()
            watch.lap("run")

        return run

    records = interleave(
        {name: lambda function=f: timed(function) for name, f in found.items()},
        args.repeats,
        args.device,
        "kernels",
        optional=found,
        errors=Exception,
    )
    return {
        name: summary(record["laps"], "run")
        if "laps" in record
        else _not_timed(record, is_ours=True)
        for name, record in records.items()
    }

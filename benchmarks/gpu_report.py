"""Results of the GPU benchmark: failures, verdicts on the goals, and tables in Markdown."""

from collections.abc import Callable, Iterator
from typing import Any

from entries import DEFAULT
from machine import markdown

Results = dict[str, dict[str, Any]]

NOT_MEASURED = "Not yet measured."

_COMPARED = "scale 256/8"
_PRECISIONS = ("float32", "tf32", "autocast")
# The ceiling of matrix products in each.
_MATMULS = {"float32": "float32", "tf32": "tf32", "autocast": "bfloat16"}


def failures(results: Results, unfinished: list[str]) -> list[str]:
    """Lines on everything that failed: checks, errors, and parts that were cut."""
    lines = [f"{part}: not finished; start again to go on" for part in unfinished]
    for part, items in results.items():
        for item, result in items.items():
            lines += _failures_of(f"{part}: {item}", result)
    return lines


def _failures_of(where: str, result: dict[str, Any]) -> Iterator[str]:
    if "error" in result:
        yield f"{where}: {result['error']}"
    for check in result.get("checks", []):
        error, limit = check["error"], check["bound"]
        # JSON has no infinity.
        if error is None or not error <= limit:
            yield f"{where}, {check['check']}: error {_plain(error)} is above {limit:.1e}"
    for name, value in result.items():
        if isinstance(value, dict):
            yield from _failures_of(f"{where}, {name}", value)


def _plain(error: float | None) -> str:
    return "infinite" if error is None else f"{error:.1e}"


def _steps(results: Results, precision: str, name: str) -> dict[str, Any]:
    """The record of an SAE's steps; empty if there is none."""
    for group in ("steps, narrow", "steps, wide"):
        record = results.get(f"times, {precision}", {}).get(group, {})
        if "both" in record.get(name, {}):
            return record[name]
    return {}


def share_of_ceiling(
    results: Results, precision: str, record: dict[str, Any]
) -> float | None:
    """
    Least time by the machine's measured ceilings, by the time of a forward and backward pass.

    The least time is that of moving the bytes or of computing the FLOPs, the longer of the two.
    """
    found = results.get("machine", {}).get("ceilings", {})
    names = ("copy", f"{_MATMULS[precision]} matmul")
    if not record or any(name not in found for name in names):
        return None
    copy, matmul = (found[name]["per_second"] for name in names)
    least = max(record["least_bytes"] / copy, record["flops"] / matmul)
    return least / record["both"]["median"]


def goals(results: Results) -> list[dict[str, str]]:
    """Rows: goals in each precision, with the measured value and the verdict."""
    rows = []
    for precision in _PRECISIONS:
        ours = _steps(results, precision, _COMPARED)
        default = _steps(results, precision, DEFAULT)
        rows += [
            _goal(
                "at least 192,000 tokens/s, whole steps of the default SAE",
                precision,
                default.get("tokens_per_second"),
                lambda v: v >= 192_000,
                "{:,.0f}",
            ),
            _goal(
                "forward and backward at least 10 times as fast as TopK of as many latents",
                precision,
                _slower(results, precision, ours, wide=True),
                lambda v: v >= 10,
                "{:.1f}",
            ),
            _goal(
                "forward and backward at most 1.5 times TopK of as many active latents",
                precision,
                _slower(results, precision, ours, wide=False),
                lambda v: v <= 1.5,
                "{:.2f}",
            ),
            _goal(
                "at least half of what memory and matrix units allow",
                precision,
                share_of_ceiling(results, precision, ours),
                lambda v: v >= 0.5,
                "{:.2f}",
            ),
        ]
    rows.append(
        _goal(
            "no host synchronisation in a step without dead latents",
            "tf32",
            _synchronisations(results.get("profile", {})),
            lambda v: v == 0,
            "{:.0f}",
        )
    )
    return rows


def _goal(
    goal: str,
    precision: str,
    value: float | None,
    reached: Callable[[float], bool],
    form: str,
) -> dict[str, str]:
    verdict, measured = "not measured", "-"
    if value is not None:
        verdict = "reached" if reached(value) else "missed"
        measured = form.format(value)
    return {
        "goal": goal,
        "precision": precision,
        "measured": measured,
        "verdict": verdict,
    }


def _synchronisations(found: dict[str, Any]) -> float | None:
    """Number in a step: that torch noticed or, as it does not notice all, that CUDA was called for."""
    noticed = found.get("host synchronisations, 0% dead", {})
    if not noticed.get("measured"):
        return None
    calls = found.get("kernels, tf32", {}).get("calls", {})
    return max(
        len(noticed["synchronisations"]), calls.get("cudaStreamSynchronize", 0.0)
    )


def _slower(
    results: Results, precision: str, ours: dict[str, Any], wide: bool
) -> float | None:
    """
    Ratio of two times: the faster wide TopK's by ours, or ours by the narrow TopK's.
    """
    found = results.get(f"times, {precision}", {})
    dense = [
        record["both"]["median"]
        for group in ("steps, wide" if wide else "steps, narrow",)
        for name, record in found.get(group, {}).items()
        if name.startswith("TopK") and ("activations" in name) == wide
        if "dead" not in name and "both" in record
    ]
    if not ours or not dense:
        return None
    own = ours["both"]["median"]
    return min(dense) / own if wide else own / min(dense)


def page(record: dict[str, Any]) -> str:
    """The tables of docs/performance.md, from the record's file; what it says without one."""
    if not record:
        return NOT_MEASURED
    context, results = record["context"], record["results"]
    versions = ", ".join(f"{n} {v}" for n, v in context["versions"].items() if v)
    machine = context.get("gpu", context["cpu"])
    # A copy of a checkout has no commit.
    commit = context["commit"]
    code = f"commit {commit}" if commit else f"sources {record['key']['sources']}"
    sections = [
        f"{machine}, driver {context.get('driver', '-')}, {versions}, {context['date']}, {code}.",
        markdown(goals(results)),
    ]
    for precision in _PRECISIONS:
        rows = _step_rows(results, precision)
        if rows:
            sections += [f"Steps in {precision}, ms:", markdown(rows)]
    for title, rows in (
        ("Scale SAEs of many latents, ms:", _large_rows(results)),
        ("Inference, ms per batch:", _inference_rows(results)),
        ("What computes each product, ms:", _kernel_rows(results)),
        ("Waits for the GPU in a step:", _wait_rows(results)),
        ("Ceilings:", _ceiling_rows(results)),
        *(
            (f"Kernels of a step in {name.split(', ')[1]}:", _profile_rows(found))
            for name, found in results.get("profile", {}).items()
            if found.get("kernels")
        ),
    ):
        if rows:
            sections += [title, markdown(rows)]
    return "\n\n".join(sections)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}"


def _step_row(
    results: Results, precision: str, name: str, record: dict[str, Any]
) -> dict[str, str]:
    if "both" not in record:
        return {"SAE": f"{name}: {record.get('missing', record.get('error'))}"}
    share = share_of_ceiling(results, precision, record)
    peak = record["peak_bytes"]
    return {
        "SAE": name,
        **{
            part: _ms(record[part]["median"])
            for part in ("forward", "backward", "both", "step")
        },
        "tokens/s": f"{record['tokens_per_second']:,.0f}",
        "GFLOP": f"{record['flops'] / 1e9:,.0f}",
        "GB": f"{record['least_bytes'] / 1e9:,.2f}",
        "share of the ceiling": "-" if share is None else f"{share:.2f}",
        "peak, MB": f"{peak / 1e6:,.0f}" if peak else "-",
    }


def _step_rows(results: Results, precision: str) -> list[dict[str, str]]:
    found = results.get(f"times, {precision}", {})
    return [
        _step_row(results, precision, name, record)
        for group in ("steps, narrow", "steps, wide")
        for name, record in found.get(group, {}).items()
        if isinstance(record, dict)
    ]


def _large_rows(results: Results) -> list[dict[str, str]]:
    return [
        {"": f"{item}, d_in {entry.get('d_in', '-')}"}
        | _step_row(results, item.split(", ")[-1], name, entry)
        for item, record in results.get("large", {}).items()
        for name, entry in record.items()
        if isinstance(entry, dict)
    ]


def _inference_rows(results: Results) -> list[dict[str, str]]:
    return [
        {"SAE": name, "precision": precision}
        | {lap: _ms(times["median"]) for lap, times in record.items()}
        for precision in _PRECISIONS
        for name, record in results.get(f"times, {precision}", {})
        .get("inference", {})
        .items()
        if isinstance(record, dict) and "forward" in record
    ]


def _kernel_rows(results: Results) -> list[dict[str, str]]:
    rows = []
    for item, record in results.get("kernels", {}).items():
        times = {
            name: entry["median"]
            for name, entry in record.items()
            if isinstance(entry, dict) and "median" in entry
        }
        if len(times) > 1:
            best = min(times, key=lambda name: times[name])
            rows.append(
                {"product": item}
                | {name: _time_text(times, name) for name in ("torch", "Triton")}
                | {"index_add": _time_text(times, "index_add"), "fastest": best}
            )
    return rows


def _time_text(times: dict[str, float], name: str) -> str:
    """A time in ms and, in brackets, as a multiple of the fastest; "-" if there is none."""
    if name not in times:
        return "-"
    return f"{1e3 * times[name]:.3f} ({times[name] / min(times.values()):.2f})"


def _wait_rows(results: Results) -> list[dict[str, str]]:
    rows = []
    for item, found in results.get("profile", {}).items():
        waits = found.get("synchronisations", [])
        lines = {(w["part"], w["line"], w["code"]): 0 for w in waits}
        for wait in waits:
            lines[wait["part"], wait["line"], wait["code"]] += 1
        rows += [
            {
                "step": item.split(", ")[1],
                "part": part,
                "waits": str(count),
                "line": f"`{line}`",
                "code": f"`{code}`",
            }
            for (part, line, code), count in lines.items()
        ]
    return rows


def _ceiling_rows(results: Results) -> list[dict[str, str]]:
    found = results.get("machine", {}).get("ceilings", {})
    return [
        {
            "": name,
            "per second": f"{record['per_second'] / 1e9:,.0f} "
            f"{'GFLOP' if 'matmul' in name else 'GB'}",
        }
        for name, record in found.items()
        if isinstance(record, dict)
    ]


def _profile_rows(found: dict[str, Any]) -> list[dict[str, str]]:
    total = {
        "kernel": f"all, in a step of {_ms(found['step'])} ms under the profiler",
        "ms": _ms(found["busy"]),
        "launches": f"{found['launches']:.0f}",
        "share": "1.00",
    }
    return [
        total,
        *(
            {
                "kernel": f"`{kernel['kernel'][:60]}`",
                "ms": _ms(kernel["seconds"]),
                "launches": f"{kernel['launches']:.0f}",
                "share": f"{kernel['share']:.2f}",
            }
            for kernel in found["kernels"][:12]
        ),
        *(
            {"kernel": f"calls of `{name}`", "launches": f"{count:.0f}"}
            for name, count in found["calls"].items()
        ),
    ]

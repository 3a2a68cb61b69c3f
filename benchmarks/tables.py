"""
Tables of the benchmarks' records, in Markdown.

    python benchmarks/tables.py

puts those of benchmarks/results into docs/performance.md, wherever they were measured.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The laboratory has what fills a page.
sys.path.insert(0, str(Path(__file__).parents[1]))

from entries import DEFAULT, FORWARD_BACKWARD, WHOLE_STEP
from gpu_report import page
from machine import markdown, read_json, summary

from reproduction.report import fill
from sae_lens_scale.files import write_whole

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"

# SAEs by the names that the summary has for them.
_SUMMARY = {
    DEFAULT: "Scale SAE, 24,576 latents, 256 experts, 8 per token, as by default",
    "scale 256/8": "the same without Multi-TopK",
    "scale 64/2": "Scale SAE, 24,576 latents, 64 experts, 2 per token, without Multi-TopK",
    "TopK 768": "SAELens's TopK SAE, 768 latents, as many as a token pays for above",
    "sparsify 24,576": "sparsify, 24,576 latents",
    "TopK 24,576, sparse activations": "SAELens's TopK SAE, 24,576 latents, sparse activations",
}

_PHASES_OF_SCALING = {
    "forward": ("forward",),
    "backward": ("backward",),
    "forward and backward": FORWARD_BACKWARD,
    "router": ("router",),
    "clipping and Adam": ("update",),
    "writing the gradients' size, reused memory": ("fill, reused memory",),
    "fresh memory": ("fill, fresh memory",),
    "whole step": WHOLE_STEP,
}

# Records of an SAE by name: its laps, or the reason why there are none.
_Records = Mapping[str, dict[str, Any]]


def speed_tables(record: Mapping[str, Any]) -> dict[str, str]:
    """
    Make the tables of a record of speed.py.

    Args:
        record: ``results``, ``settings`` and ``context`` of each part that was measured.

    Returns:
        Tables by name.
    """
    found = {}
    for part, make in _OF_PARTS.items():
        if part in record:
            found |= make(record[part]["results"], record[part]["settings"])
    if "step" in record:
        context = record["step"]["context"]
        found["hardware"] = _hardware(context, record["step"]["settings"])
    return found


def training_tables(record: Mapping[str, Any]) -> dict[str, str]:
    """Make the table of a record of training.py, in milliseconds per step."""
    rows = [
        {"ms per step": name} | {part: f"{value:.0f}" for part, value in parts.items()}
        for name, parts in record["results"].items()
    ]
    return {"training": markdown(rows)}


def caching_tables(record: Mapping[str, Any]) -> dict[str, str]:
    """Make the table of a record of caching.py, by tokens that were cached, read or trained on."""
    rows = []
    for name, result in record["results"].items():
        tokens, times = record["tokens"][name], summary(result["laps"], "work")
        row = {
            "": name,
            "tokens/s": f"{tokens / times['median']:,.0f}",
            "CPU s per 1,000 tokens": f"{1e3 * times['cpu_median'] / tokens:.3f}",
        }
        rows.append(row)
    return {"caching": markdown(rows)}


def _hardware(context: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    versions = {n: v for n, v in context["versions"].items() if v is not None}
    facts = {
        "processor": context.get("gpu")
        or f"{context['cpu']}, {context['cores']} shared cores, {context['threads']} threads",
        "date": context["date"],
        "commit": context["commit"],
        "versions": ", ".join(f"{name} {v}" for name, v in versions.items()),
        "sizes": f"{settings['batch']:,} tokens, d_in {settings['d_in']:,}, "
        f"d_sae {settings['d_sae']:,}, k {settings['k']}, {settings['dtype']}",
        "load average at the start": ", ".join(
            f"{load:.1f}" for load in context["load_average"]
        ),
    }
    return markdown([{"": name, "measured on": fact} for name, fact in facts.items()])


def _machine(results: _Records, _: object) -> dict[str, str]:
    rows = []
    for name, record in results.items():
        unit = "GFLOP/s" if "matmul" in name else "GB/s"
        row = {"ceiling": name, "": f"{record['per_second'] / 1e9:,.1f} {unit}"}
        rows.append(row)
    return {"machine": markdown(rows)}


def _step(results: Mapping[str, _Records], _: object) -> dict[str, str]:
    found = {
        "step": _steps(results["main"]),
        "step-expensive": _steps(results["expensive"]),
    }
    if DEFAULT in results["expensive"]:
        found["cost"] = _cost(results)
    return found


def _steps(records: _Records) -> str:
    # Those that the others are compared with.
    topk = next(name for name in records if name.startswith("TopK"))
    references = {
        n: both for n in (next(iter(records)), topk) if (both := _both(records[n]))
    }
    rows = []
    for name, record in records.items():
        if "missing" in record:
            rows.append({"ms": f"{name}: {record['missing']}"})
            continue
        laps, both = record["laps"], _both(record)
        ratios = {f"/ {n}": f"{both / other:.2f}" for n, other in references.items()}
        per_second = {
            "GFLOP/s": sum(record["flops"].values()) / both,
            "GB/s": record["least_bytes"] / both,
        }
        row = {
            "ms": name,
            **{phase: _ms(laps, phase) for phase in FORWARD_BACKWARD},
            "both": _ms(laps, *FORWARD_BACKWARD),
            "least": _ms(laps, *FORWARD_BACKWARD, of="min"),
            "CPU time": _ms(laps, *FORWARD_BACKWARD, of="cpu_median"),
            "whole step": _ms(laps, *WHOLE_STEP),
            **ratios,
            **{unit: f"{value / 1e9:,.3g}" for unit, value in per_second.items()},
        }
        rows.append(row)
    return markdown(rows)


def _cost(results: Mapping[str, _Records]) -> str:
    """A summary for users: SAEs that run often, then those of the expensive group."""
    rows = []
    for name, label in _SUMMARY.items():
        group = results["main" if name in results["main"] else "expensive"]
        both = _both(group.get(name, {}))
        if both:
            ratio = both / _both(group[DEFAULT])
            rows.append(
                {
                    "forward and backward pass": label,
                    "ms": f"{1e3 * both:,.0f}",
                    "against the first": f"{ratio:.2g}",
                }
            )
    return markdown(rows)


def _inference(
    results: Mapping[str, _Records], settings: Mapping[str, Any]
) -> dict[str, str]:
    batches = settings["tokens"] / settings["batch"]
    rows = []
    for group, records in results.items():
        for name, record in records.items():
            row = {f"s for {settings['tokens']:,} tokens": name, "group": group}
            for lap in record.get("laps", {}):
                times = summary(record["laps"], lap)
                row[lap] = f"{times['median'] * batches:.2f}"
                row[f"{lap}, least"] = f"{times['min'] * batches:.2f}"
                row[f"{lap}, CPU time"] = f"{times['cpu_median'] * batches:.2f}"
            rows.append(row)
    return {"inference": markdown(rows)}


def _scaling(results: Mapping[str, Any], _: object) -> dict[str, str]:
    rows = []
    for name, record in results["widths"].items():
        laps = record["laps"]
        times = {head: _ms(laps, *names) for head, names in _PHASES_OF_SCALING.items()}
        rows.append({"ms": name, "d_sae": f"{record['d_sae']:,}", **times})
    found = {"scaling": markdown(rows)}
    million = results.get("million")
    if million is None:
        return found
    entry = million["entry"]
    row = {
        "ms": entry["name"],
        "d_sae": f"{entry['d_sae']:,}",
        "d_in": f"{entry['d_in']:,}",
    }
    if "laps" in million:
        laps, rss = million["laps"], million["peak_rss"]
        row["forward and backward"] = _ms(laps, *FORWARD_BACKWARD)
        row["whole step"] = _ms(laps, *WHOLE_STEP)
        row["GB resident at most"] = f"{rss / 1e9:.1f}" if rss else "-"
    else:
        row["forward and backward"] = million["missing"]
    found["million"] = markdown([row])
    return found


def _memory(results: _Records, _: object) -> dict[str, str]:
    rows = []
    for name, record in results.items():
        if "missing" in record:
            rows.append({"MB": f"{name}: {record['missing']}"})
            continue
        peak = record["peak_in_torch"] + record["peak_outside_torch"]
        rss = record.get("rss_growth_with_gradients")
        row = {
            "MB": name,
            "peak": f"{peak / 1e6:,.0f}",
            "that bound": f"{record['bound'] / 1e6:,.0f}",
            "growth of resident memory, with gradients": f"{rss / 1e6:,.0f}"
            if rss is not None
            else "-",
        }
        rows.append(row)
    return {"memory": markdown(rows)}


_OF_PARTS = {
    "machine": _machine,
    "step": _step,
    "inference": _inference,
    "scaling": _scaling,
    "memory": _memory,
}


def _both(record: Mapping[str, Any]) -> float:
    """Median seconds of a forward and backward pass; 0 if it was not measured."""
    return (
        summary(record["laps"], *FORWARD_BACKWARD)["median"]
        if "laps" in record
        else 0.0
    )


def _ms(laps: dict[str, Any], *names: str, of: str = "median") -> str:
    ms = 1e3 * summary(laps, *names)[of]
    return f"{ms:,.0f}" if ms >= 10 else f"{ms:.1f}"


def renew_page(path: Path = ROOT / "docs/performance.md") -> None:
    """Write the tables of all records into the page, between the lines that name them."""
    found = {
        **speed_tables(read_json(RESULTS / "speed-cpu.json")),
        **training_tables(read_json(RESULTS / "training-cpu.json")),
        **caching_tables(read_json(RESULTS / "caching-cpu.json")),
        "gpu": page(read_json(RESULTS / "gpu.json")),
    }
    write_whole(path, fill(path.read_text("utf-8"), found))


if __name__ == "__main__":
    renew_page(*map(Path, sys.argv[1:]))

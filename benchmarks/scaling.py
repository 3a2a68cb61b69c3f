"""
Cost of a training step of a Scale SAE on many GPUs, on paper.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --overlap 0.7 --tokens 8192 --output scale-out.png
    python benchmarks/scaling.py --d_in 2304 --d_sae 65536 --num_experts 512 \\
        --experts_per_token 8 --k 64 --gpus 16

Prints its assumptions, then for each SAE and number of GPUs the bytes that a rank sends, its
memory, the time of a step and the efficiency, also if computing hides all communication that it
can, in three layouts; then what the bytes are for. Nothing is measured and no GPU is needed:
cost_model.py has the formulas.
"""

import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from cost_model import (
    Assumptions,
    Kind,
    Layout,
    Shape,
    best_layout,
    efficiency,
    fits,
    memory_bytes,
    seconds,
    wire_bytes,
)
from machine import markdown
from simple_parsing import parse
from simple_parsing.docstring import get_attribute_docstring

from sae_lens_scale.extras import require

LAYOUTS: dict[Kind, str] = {
    "data": "data parallel",
    "experts": "expert parallel",
    "latents": "latents sharded",
}
# Okabe and Ito's colours.
STYLES: dict[Kind, tuple[str, str]] = {
    "data": ("#D55E00", "^"),
    "experts": ("#0072B2", "o"),
    "latents": ("#CC79A7", "s"),
}


@dataclass
class Args(Assumptions):
    """Cost of SAEs, one for each place of the five lists, on each number of GPUs."""

    d_in: list[int] = field(default_factory=lambda: [768, 4096, 16_384])
    d_sae: list[int] = field(default_factory=lambda: [24_576, 1 << 20, 1 << 24])
    num_experts: list[int] = field(default_factory=lambda: [256, 1024, 8192])
    experts_per_token: list[int] = field(default_factory=lambda: [8, 4, 16])
    k: list[int] = field(default_factory=lambda: [32, 64, 256])
    gpus: list[int] = field(default_factory=lambda: [8, 64, 1024])
    output: Path | None = None  # picture, PNG, from the least to the most GPUs

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("d_sae", "num_experts", "experts_per_token", "k"):
            if len(getattr(self, name)) != len(self.d_in):
                raise ValueError(
                    f"{name} must have as many numbers as d_in={self.d_in}, got "
                    f"{getattr(self, name)}"
                )
        if not self.gpus or min(self.gpus) < 1:
            raise ValueError(f"gpus must be at least 1, got {self.gpus}")
        for gpus in self.gpus:
            if gpus > self.gpus_per_node and gpus % self.gpus_per_node:
                raise ValueError(
                    f"gpus must fill nodes of {self.gpus_per_node}, got {gpus}"
                )
        if self.output and self.output.suffix != ".png":
            raise ValueError(f"output must end in .png, got {self.output}")

    @property
    def shapes(self) -> list[Shape]:
        lists = (getattr(self, shape_field.name) for shape_field in fields(Shape))
        return [Shape(*sizes) for sizes in zip(*lists, strict=True)]


def assumptions(args: Args) -> list[dict[str, str]]:
    """Rows of a table: value and meaning of each option, but sizes and the picture."""
    return [
        {
            "option": of_field.name,
            "value": _text(getattr(args, of_field.name)),
            "": get_attribute_docstring(Assumptions, of_field.name).comment_inline,
        }
        for of_field in fields(Assumptions)
    ]


def costs(args: Args) -> list[dict[str, str]]:
    """Rows of a table: each SAE in each layout on each number of GPUs."""
    return [
        _cost(shape, best_layout(shape, kind, gpus, args), args)
        for shape in args.shapes
        for gpus in args.gpus
        for kind in LAYOUTS
    ]


def _cost(shape: Shape, layout: Layout, args: Args) -> dict[str, str]:
    memory = memory_bytes(shape, layout, args)
    activations = memory.pop("activations")
    spent = seconds(shape, layout, args)
    return {
        **_head(shape, layout),
        "layout": LAYOUTS[layout.kind],
        "ranks": f"{layout.ranks:,}",
        "kB sent per token": _kilo(sum(wire_bytes(shape, layout, args).values()), args),
        "GB, weights to Adam": f"{sum(memory.values()) / 1e9:,.1f}",
        "GB, activations": f"{activations / 1e9:,.1f}",
        "fits": "yes" if fits(shape, layout, args) else "no",
        **{f"ms, {part}": f"{1e3 * spent[part]:,.1f}" for part in spent},
        "efficiency": f"{efficiency(shape, layout, args):.2f}",
        "if all is hidden": f"{efficiency(shape, layout, replace(args, overlap=1.0)):.2f}",
    }


def purposes(args: Args) -> list[dict[str, str]]:
    """Rows of a table: kB that a rank sends per own token in expert parallel, by purpose."""
    rows = []
    for shape in args.shapes:
        for gpus in args.gpus:
            layout = best_layout(shape, "experts", gpus, args)
            sent = wire_bytes(shape, layout, args)
            rows.append(
                {**_head(shape, layout), "ranks": f"{layout.ranks:,}"}
                | {purpose: _kilo(number, args) for purpose, number in sent.items()}
            )
    return rows


def _head(shape: Shape, layout: Layout) -> dict[str, str]:
    return {
        "latents": f"{shape.d_sae:,}",
        "d_in": f"{shape.d_in:,}",
        "GPUs": f"{layout.gpus:,}",
    }


def _text(value: bool | float) -> str:
    return str(value) if isinstance(value, bool) else f"{value:,}"


def _kilo(number: float, args: Args) -> str:
    return f"{number / args.tokens / 1e3:,.1f}"


def plot(args: Args, path: Path) -> None:
    """Draw bytes, memory and efficiency against the number of GPUs, a column for each SAE."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter

    figure = Figure(figsize=(1 + 3.6 * len(args.shapes), 8), layout="constrained")
    panels = figure.subplots(
        3, len(args.shapes), sharex=True, sharey="row", squeeze=False
    )
    counts = _counts(args)
    for column, shape in enumerate(args.shapes):
        for kind, (color, marker) in STYLES.items():
            layouts = [best_layout(shape, kind, gpus, args) for gpus in counts]
            lines = [
                [
                    sum(wire_bytes(shape, la, args).values()) / args.tokens
                    for la in layouts
                ],
                [sum(memory_bytes(shape, la, args).values()) / 1e9 for la in layouts],
                [efficiency(shape, la, args) for la in layouts],
            ]
            fitting = [fits(shape, la, args) for la in layouts]
            for axes, line in zip(panels[:, column], lines, strict=True):
                axes.plot(counts, line, color=color, linewidth=1.5, label=LAYOUTS[kind])
                for gpus, value, full in zip(counts, line, fitting, strict=True):
                    face = color if full else "white"
                    axes.plot(
                        gpus,
                        value,
                        marker,
                        color=color,
                        markerfacecolor=face,
                        markersize=5,
                    )
        top, middle, bottom = panels[:, column]
        top.set_title(f"{shape.d_sae:,} latents, d_in {shape.d_in:,}", fontsize=10)
        top.set_yscale("log")
        middle.set_yscale("log")
        middle.axhline(args.gpu_memory, color="gray", linestyle="--", linewidth=1)
        bottom.set_ylim(0, 1.05)
        bottom.set_xscale("log", base=2)
        bottom.set_xlabel("GPUs")
        bottom.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    for axes, name in zip(
        panels[:, 0],
        ("bytes sent per own token", "GB per GPU", "efficiency"),
        strict=True,
    ):
        axes.set_ylabel(name)
    for axes in panels.flat:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(fontsize=8)
    figure.suptitle(
        "A model, nothing measured; dashed: a GPU's memory; hollow: does not fit into it",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _counts(args: Args) -> list[int]:
    """Numbers of GPUs from the least to the most, doubling, with those that were named."""
    doubled = [min(args.gpus)]
    while 2 * doubled[-1] <= max(args.gpus):
        doubled.append(2 * doubled[-1])
    return sorted({*doubled, *args.gpus})


def main() -> None:
    try:
        args = parse(Args)
        shapes = args.shapes
        if args.output:
            require("matplotlib", "plots")
    except (ImportError, ValueError) as error:
        sys.exit(f"scaling.py: error: {error}")
    print(f"Assumptions\n\n{markdown(assumptions(args))}")
    print("\nSAEs\n")
    print(markdown([{n: f"{v:,}" for n, v in vars(s).items()} for s in shapes]))
    print("\nA step; ranks: GPUs that have the SAE once between them\n")
    print(markdown(costs(args)))
    print("\nkB that a rank sends per own token in expert parallel, by purpose\n")
    print(markdown(purposes(args)))
    if args.output:
        plot(args, args.output)


if __name__ == "__main__":
    main()

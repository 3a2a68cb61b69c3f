"""
The laboratory's commands: ``python -m reproduction cache | run | evaluate | report | table``, and
``synthetic``, which does all of this with activations that are not a language model's.
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any, get_type_hints

import torch

from sae_lens_scale.cli.arguments import positive
from sae_lens_scale.cli.output import error_text, print_result
from sae_lens_scale.files import require_writable, write_whole

from .activations import ActivationCache, CacheSettings
from .caching import cache_activations
from .evaluation import evaluate_records
from .grid import run_grid
from .presets import PRESETS
from .records import read, read_records, write_tables
from .report import draw, fill, tables
from .settings import RunSettings
from .synthetic import (
    score_records,
    synthetic_activations,
    synthetic_runs,
    synthetic_table,
)
from .tables import summary

_DEFAULT_FOLDER = Path("outputs/experiments")


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run a command.

    Returns:
        The exit status: 0, 1 for an error, 130 after an interruption. Wrong usage exits
        with 2, as argparse does.
    """
    options = _parser().parse_args(arguments)
    # SIGTERM ends a command as SIGINT does: workers stop, and temporary files go.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print_result(options.run(options))
        return 0
    except KeyboardInterrupt:
        status, complaint = 130, "interrupted"
    except Exception as error:
        # Bad arguments and files end as errors of any type, deep in a library.
        if options.traceback:
            raise
        status, complaint = 1, error_text(error)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"reproduction: error: {complaint}", file=sys.stderr)  # noqa: T201
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reproduction",
        description="Measure SAEs against each other. First cache, then run, and "
        "evaluate if the language model's loss matters. All of them go on where they "
        "were interrupted.",
    )
    parser.add_argument(
        "--traceback",
        action="store_true",
        help="show where an error came from (before the command)",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    cache = _add(commands, "cache", "cache a language model's activations", _cache)
    cache.add_argument("--prompts_per_batch", type=positive, default=16)

    run = _add(commands, "run", "train what has no record yet", _run)
    _add_choice(run)
    run.add_argument(
        "--workers", type=positive, default=1, help="runs at the same time"
    )
    run.add_argument(
        "--threads", type=positive, help="of each; by default cores / workers"
    )
    run.add_argument(
        "--keep_weights",
        action="store_true",
        help="leave each SAE in a folder beside its record; evaluate needs it",
    )
    run.add_argument("--list", action="store_true", help="name the runs, train nothing")

    evaluate = _add(
        commands, "evaluate", "add the language model's loss to the records", _evaluate
    )
    evaluate.add_argument(
        "--contexts",
        type=positive,
        default=64,
        help="of each text (default: %(default)s)",
    )

    report = _add(commands, "report", "print tables of the runs, draw figures", _report)
    report.add_argument(
        "--records",
        type=Path,
        help="folder of the records, or of tables made of them, if it is another",
    )
    _add_documents(report)
    report.add_argument("--images", type=Path, help="folder for the figures")
    report.add_argument(
        "--figures",
        nargs="+",
        help="names of those to draw, such as figure-3a; by default all that the records "
        "suffice for",
    )

    table = _add(commands, "table", "write the records as tables, in CSV", _table)
    table.add_argument("--output", type=Path, required=True, help="folder for them")

    _add_synthetic(commands)
    return parser


def _add(commands: Any, name: str, help: str, run: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=f"{help.capitalize()}.")
    parser.add_argument("--preset", required=True, choices=sorted(PRESETS))
    parser.add_argument(
        "--folder",
        type=Path,
        help="of activations and records (default: outputs/experiments and the base of "
        "the preset's name)",
    )
    parser.add_argument(
        "--cache",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting of the activations, such as train_tokens=500000",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    parser.set_defaults(run=run)
    return parser


def _add_choice(
    parser: argparse.ArgumentParser, seeds: str = "by default the preset's"
) -> None:
    parser.add_argument(
        "--only", help='part of the names of the runs to train, such as "scale-64*k32"'
    )
    parser.add_argument("--seeds", type=int, nargs="+", help=seeds)
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting of the runs, or a field of their SAEs, such as lr=8e-4; "
        "several values, separated by commas, make a run each",
    )


def _add_synthetic(commands: Any) -> None:
    help = "train on synthetic activations, and count the features that were found"
    parser = commands.add_parser(
        "synthetic",
        help=help,
        description=f"{help.capitalize()}. Goes on where it was interrupted.",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=_DEFAULT_FOLDER / "synthetic",
        help="of activations and records (default: %(default)s)",
    )
    _add_choice(parser, "default: 0 1 2")
    parser.add_argument(
        "--threads", type=positive, default=1, help="default: %(default)s"
    )
    parser.add_argument("--output", type=Path, help="folder for the records in CSV")
    _add_documents(parser)
    parser.set_defaults(run=_synthetic)


def _add_documents(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--documents",
        type=Path,
        nargs="+",
        default=[],
        help='put the tables into these, between "<!-- table NAME -->" and "<!-- end -->"',
    )


def _cache(options: argparse.Namespace) -> str:
    folder = _folder(options) / "activations"
    cache = cache_activations(
        _cache_settings(options),
        folder,
        prompts_per_batch=options.prompts_per_batch,
        device=options.device,
    )
    # With other packages installed the text is another; its hashes show that.
    hashes = [f"{split}: {digest}" for split, digest in cache.text_hashes.items()]
    return "\n".join([str(folder), *hashes])


def _run(options: argparse.Namespace) -> str:
    runs = select_runs(
        PRESETS[options.preset].with_seeds(options.seeds), options.set, options.only
    )
    if options.list:
        return "\n".join(run.name for run in runs)
    folder = _folder(options)
    cache = ActivationCache.open(folder / "activations", _cache_settings(options))
    run_grid(
        runs,
        cache,
        folder / "runs",
        workers=options.workers,
        threads=options.threads,
        device=options.device,
        keep_weights=options.keep_weights,
    )
    return summary(read(folder / "runs", [run.name for run in runs]))


def _evaluate(options: argparse.Namespace) -> str:
    folder = _folder(options) / "runs"
    records = evaluate_records(
        folder,
        _cache_settings(options),
        contexts=options.contexts,
        device=options.device,
    )
    evaluated = f"{len(records)} records in {folder} were evaluated"
    without = sum(
        record.measures.get("loss_recovered", {}).get("contexts") != options.contexts
        for record in read_records(folder)
    )
    if without:
        evaluated += f", {without} could not be: run --keep_weights"
    return evaluated


def _report(options: argparse.Namespace) -> str:
    base = PRESETS[options.preset].base
    records = options.records or _folder(options) / "runs"
    found = tables(records, base)
    _fill(options.documents, found)
    if options.images is not None:
        drawn = draw(records, base, options.images, options.figures)
        found["figures"] = "\n".join(map(str, drawn))
    return "\n\n".join(f"{name}\n\n{text}" for name, text in found.items())


def _fill(documents: Sequence[Path], found: dict[str, str]) -> None:
    filled = {path: fill(path.read_text("utf-8"), found) for path in documents}
    for path, text in filled.items():
        write_whole(path, text)


def _table(options: argparse.Namespace) -> str:
    return "\n".join(map(str, write_tables(_folder(options) / "runs", options.output)))


def _synthetic(options: argparse.Namespace) -> str:
    runs = select_runs(
        synthetic_runs(*([options.seeds] if options.seeds else [])),
        options.set,
        options.only,
    )
    # Mistakes show before the long work.
    for run in runs:
        run.sae_config(1)
    if options.output is not None:
        require_writable("--output", options.output)
    for document in options.documents:
        fill(document.read_text("utf-8"), {"synthetic": ""})
    folder = options.folder / "runs"
    model, cache = synthetic_activations(options.folder)
    run_grid(runs, cache, folder, threads=options.threads, keep_weights=True)
    score_records(folder, model)
    if options.output is not None:
        write_tables(folder, options.output)
    if options.documents:
        _fill(options.documents, {"synthetic": synthetic_table(folder)})
    found = read(folder, [run.name for run in runs])
    return summary(found, ["recovered", "mcc", "f1", "fvu"])


def select_runs(
    runs: Sequence[RunSettings], changes: Sequence[str] = (), only: str | None = None
) -> list[RunSettings]:
    """
    Choose the runs whose name, before any change, contains ``only`` (``*`` stands for anything),
    and change them.

    Args:
        changes: ``NAME=VALUE`` each: a setting, or a field of the SAE's config, in JSON
            (strings may go without quotes). Several values, separated by commas, make a
            run each. SAEs that lack a field stay as they are.

    Returns:
        The runs, without repetitions.

    Raises:
        ValueError: If a change is malformed or concerns no run, or no run is left.
    """
    selected = [run for run in runs if fnmatch(run.name, f"*{only or ''}*")]
    if not selected:
        names = ", ".join(run.name for run in runs)
        raise ValueError(f"no run's name contains {only!r}: {names}")
    parsed = [_parse_change(change) for change in changes]
    names = [name for name, _ in parsed]
    for name in names:
        if not any(name in _settable(run) for run in selected):
            raise ValueError(f"{name!r} is neither a setting nor a field of any SAE")
        if names.count(name) > 1:
            raise ValueError(f"{name} must be set once, its values separated by commas")
    varied = [
        _changed(run, dict(zip(names, values, strict=True)))
        for run in selected
        for values in product(*(values for _, values in parsed))
    ]
    return list({run.name: run for run in varied}.values())


def _settable(run: RunSettings) -> set[str]:
    return {*get_type_hints(RunSettings), *run.sae_fields()}


def _changed(run: RunSettings, changes: dict[str, Any]) -> RunSettings:
    own = {n: v for n, v in changes.items() if n in get_type_hints(RunSettings)}
    sae = {n: v for n, v in changes.items() if n not in own and n in run.sae_fields()}
    return replace(run, **{"sae": {**run.sae, **sae}, **own})


def _parse_change(change: str) -> tuple[str, list[Any]]:
    name, equals, text = change.partition("=")
    if not equals:
        raise ValueError(f"a change must be NAME=VALUE, got {change!r}")
    try:
        return name, [json.loads(text)]
    except ValueError:
        return name, [_parse_value(part) for part in text.split(",")]


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _cache_settings(options: argparse.Namespace) -> CacheSettings:
    settings = PRESETS[options.preset].cache
    known = get_type_hints(CacheSettings)
    for change in options.cache:
        name, values = _parse_change(change)
        if name not in known or len(values) > 1:
            raise ValueError(
                f"--cache must set one of {', '.join(sorted(known))}, got {change!r}"
            )
        settings = replace(settings, **{name: values[0]})
    return settings


def _folder(options: argparse.Namespace) -> Path:
    return options.folder or _DEFAULT_FOLDER / PRESETS[options.preset].base


if __name__ == "__main__":
    sys.exit(main())

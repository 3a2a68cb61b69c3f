"""
The command line: ``sae-lens-scale train | evaluate | convert | info | experiment``.

``train`` is SAELens's own training command with the architectures of this package
known to it; the others do what SAELens offers only from Python.
"""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.training._interruption import InterruptedException

from sae_lens_scale.cli.errors import error_text
from sae_lens_scale.cli.sae_commands import add_sae_commands
from sae_lens_scale.loading.authors import convert_authors_checkpoint
from sae_lens_scale.runner import InterruptibleTrainingRunner


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run a command.

    Args:
        arguments: What follows ``sae-lens-scale``; by default the process's own.

    Returns:
        The exit status: 0, 1 for an error, 130 after an interruption. Wrong usage exits
        with 2, as argparse does.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if options.command == "train":
            # None leaves them to the checkpoint that the run goes on from.
            lr_factors = dict(options.lr_factors) or None
            # SAELens takes no options at all for a call for help.
            if not rest or {"-h", "--help"} & set(rest):
                _print(options.own_help())
            _train(rest, options.fused_optimizer, lr_factors)
        else:
            _print(options.run(options))
    except (KeyboardInterrupt, InterruptedException) as interruption:
        _complain(
            f"interrupted; {interruption}" if str(interruption) else "interrupted"
        )
        return 130
    except Exception as error:
        # Bad arguments and files end as errors of any type, deep in a library.
        if options.traceback:
            raise
        _complain(error_text(error))
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sae-lens-scale", description=__doc__)
    parser.add_argument(
        "--traceback",
        action="store_true",
        help="show where an error came from (before the command)",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    # SAELens's parser reads everything else that follows, --help included.
    train = commands.add_parser(
        "train",
        help="train an SAE with SAELens's runner",
        description="Options besides those of SAELens's runner, which follow.",
        add_help=False,
        allow_abbrev=False,
    )
    train.set_defaults(own_help=train.format_help)
    train.add_argument(
        "--fused_optimizer",
        action="store_true",
        help="torch's fused Adam: equal up to rounding, several times faster on a CPU",
    )
    train.add_argument(
        "--lr_factors",
        type=_lr_factor,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FACTOR",
        help="what the learning rates of single parameters are multiplied by, such as "
        "W_router=0.1 b_router=0.1; with --resume_from_checkpoint the checkpoint's, "
        "unless some are given",
    )

    convert = commands.add_parser(
        "convert",
        help="convert a checkpoint of the authors' code to SAELens's format",
        description="Convert a checkpoint of the authors' code (Switch SAE of Mudide et "
        "al., multi-expert SAE or Scale SAE of Xu et al.) to a folder that "
        "SAE.load_from_disk reads.",
    )
    convert.add_argument("source", type=Path, help="their file, or the folder of it")
    convert.add_argument("target", type=Path, help="folder to create")
    convert.add_argument(
        "--k",
        type=int,
        help="latents kept per token; this and the next two by default from the "
        "config.json beside the file",
    )
    convert.add_argument(
        "--experts_per_token", type=int, help="experts that each token selects"
    )
    convert.add_argument(
        "--heaviside",
        action=argparse.BooleanOptionalAction,
        help="whether its gates are 1",
    )
    convert.add_argument("--model_name", help="language model, for the metadata")
    convert.add_argument("--hook_name", help="its hook, for the metadata")
    convert.set_defaults(run=_convert)

    add_sae_commands(commands)

    return parser


def _lr_factor(text: str) -> tuple[str, float]:
    name, _, factor = text.partition("=")
    try:
        return name, float(factor)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be NAME=FACTOR, such as W_router=0.1, got {text!r}"
        ) from error


def _train(
    arguments: list[str], fused_optimizer: bool, lr_factors: dict[str, float] | None
) -> None:
    # SAELens's parser prints its usage, over a hundred options, before each error.
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            cfg = _parse_cfg_args(arguments)
    except argparse.ArgumentError as error:
        _complain(error_text(error))
        raise SystemExit(2) from error
    except SystemExit as stop:
        if stop.code:
            _complain(printed.getvalue().strip().rsplit("error: ", 1)[-1])
        raise
    sys.stderr.write(printed.getvalue())
    if cfg.training_tokens < 1:
        raise ValueError(
            f"--training_tokens must be positive, got {cfg.training_tokens}"
        )
    # SAELens would notice when it saves, at the end.
    for name in ("output_path", "checkpoint_path"):
        path = Path(getattr(cfg, name) or ".").absolute()
        existing = next(p for p in (path, *path.parents) if p.exists())
        if not existing.is_dir():
            raise NotADirectoryError(f"--{name}: {existing} is no folder")
    InterruptibleTrainingRunner(
        cfg, fused_optimizer=fused_optimizer, lr_factors=lr_factors
    ).run()


def _convert(options: argparse.Namespace) -> str:
    folder = convert_authors_checkpoint(
        options.source,
        options.target,
        k=options.k,
        experts_per_token=options.experts_per_token,
        heaviside=options.heaviside,
        model_name=options.model_name,
        hook_name=options.hook_name,
    )
    return str(folder)


def _complain(text: str) -> None:
    print(f"sae-lens-scale: error: {text}", file=sys.stderr)  # noqa: T201


def _print(text: str) -> None:
    try:
        print(text, flush=True)  # noqa: T201  (a command's result)
    except OSError as error:
        # Python flushes once more at exit, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # Whoever closed the pipe (head, say) has read enough.
        if not isinstance(error, BrokenPipeError):
            raise

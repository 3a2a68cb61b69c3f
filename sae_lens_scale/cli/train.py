"""``sae-lens-scale train``: SAELens's training command, with our runner and its options."""

import argparse
import contextlib
import io
import shlex
import sys
from pathlib import Path
from typing import Any

from sae_lens.llm_sae_training_runner import _parse_cfg_args

from sae_lens_scale.runner import InterruptibleTrainingRunner

from .output import complain, error_text, note, print_result


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of an argparse parser."""
    # SAELens's parser reads everything else that follows, --help included.
    parser = commands.add_parser(
        "train",
        help="train an SAE with SAELens's runner",
        description="Options besides those of SAELens's runner, which follow.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.set_defaults(format_help=parser.format_help)
    parser.add_argument(
        "--fused_optimizer",
        action="store_true",
        help="torch's fused Adam: equal up to rounding, several times faster on a CPU",
    )
    parser.add_argument(
        "--lr_factors",
        type=_lr_factor,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FACTOR",
        help="factors of the learning rates of single parameters, such as "
        "W_router=0.1 b_router=0.1; with --resume_from_checkpoint the checkpoint's, "
        "unless some are given",
    )


def run(options: argparse.Namespace, arguments: list[str]) -> None:
    """
    Train, with our own options and the rest of the command line, for SAELens's parser.

    Raises:
        SystemExit: If SAELens's parser is asked for help or refuses an argument.
        ValueError: If there is nothing to train on.
        NotADirectoryError: If a folder to write into is no folder.
    """
    # SAELens takes no options at all for a call for help.
    if not arguments or {"-h", "--help"} & set(arguments):
        print_result(options.format_help())
    cfg = _parse(arguments)
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
        cfg,
        fused_optimizer=options.fused_optimizer,
        # None leaves them to the checkpoint that the run goes on from.
        lr_factors=dict(options.lr_factors) or None,
    ).run()
    if cfg.output_path is not None:
        note(f"next: sae-lens-scale evaluate {shlex.quote(str(cfg.output_path))}")


def _parse(arguments: list[str]) -> Any:
    # SAELens's parser prints its usage, over a hundred options, before each error.
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            cfg = _parse_cfg_args(arguments)
    except argparse.ArgumentError as error:
        complain(error_text(error))
        raise SystemExit(2) from error
    except SystemExit as stop:
        if stop.code:
            complain(printed.getvalue().strip().rsplit("error: ", 1)[-1])
        raise
    sys.stderr.write(printed.getvalue())
    return cfg


def _lr_factor(text: str) -> tuple[str, float]:
    name, _, factor = text.partition("=")
    try:
        return name, float(factor)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be NAME=FACTOR, such as W_router=0.1, got {text!r}"
        ) from error

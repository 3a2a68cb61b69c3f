"""
The command line: ``sae-lens-scale train | cache | evaluate | score | explore | info | upload | convert | run``.

``train`` is SAELens's own training command with the architectures of this package
known to it, ``cache`` keeps activations for it, and ``run`` is any other tool's; the others
evaluate, score, show, describe, upload and convert SAEs.
"""

import argparse
from collections.abc import Sequence

from sae_lens_scale._version import __version__
from sae_lens_scale.upstream import InterruptedException

from . import cache, convert, evaluate, explore, info, run, score, train, upload
from .output import complain, error_text, print_result


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run a command: the arguments after ``sae-lens-scale``, by default the process's own.

    Returns:
        The exit status: 0, 1 for an error, 130 after an interruption. Wrong usage exits
        with 2, as argparse does. Of a tool that ``run`` runs, everything passes through:
        its exit status and its exceptions.
    """
    parser = argparse.ArgumentParser(
        prog="sae-lens-scale",
        description="Train, evaluate, score, explore, describe, upload and convert Scale and "
        "Switch SAEs; run other tools on them.",
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {__version__}"
    )
    parser.add_argument(
        "--traceback",
        action="store_true",
        help="show where an error came from (before the command)",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (train, cache, evaluate, score, explore, info, upload, convert, run):
        module.add_parser(commands)
    options, rest = parser.parse_known_args(arguments)
    if options.command == "run":
        return run.run(options, rest)
    with_options_of_saelens = {"train": train.run, "cache": cache.run}
    if rest and options.command not in with_options_of_saelens:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if options.command in with_options_of_saelens:
            with_options_of_saelens[options.command](options, rest)
        else:
            print_result(options.run(options))
    except (KeyboardInterrupt, InterruptedException) as interruption:
        complain(f"interrupted; {interruption}" if str(interruption) else "interrupted")
        return 130
    except Exception as error:
        # Bad arguments and files end as errors of any type, deep in a library.
        if options.traceback:
            raise
        complain(error_text(error))
        return 1
    return 0

"""``sae-lens-scale run``: another tool's command line, with the architectures known to it."""

import argparse
import os
import runpy
import sys
from importlib.util import find_spec
from typing import Any

from .output import complain


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of an argparse parser."""
    parser = commands.add_parser(
        "run",
        usage="sae-lens-scale run -m MODULE [ARGUMENT ...]",
        help="run another tool's command line on Scale and Switch SAEs",
        description="Run a module as `python -m MODULE` does, with the architectures "
        "registered with SAELens.",
        allow_abbrev=False,
    )
    # The tool's own options may have the names of ours: all that follows is its.
    parser.add_argument(
        "-m",
        dest="tool",
        nargs=argparse.REMAINDER,
        required=True,
        metavar="MODULE",
        help="the module, and its arguments",
    )
    parser.set_defaults(usage_error=parser.error)


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """
    Run a tool's module as ``__main__``, in this process.

    Args:
        options: The module and its arguments.
        rest: Those of its arguments that argparse leaves: from a "--" on.

    Returns:
        0 when the module has ended, and 1 if there is none of that name.

    Raises:
        SystemExit: If the usage is wrong, or as the tool does.
        BaseException: Whatever the tool raises.
    """
    if rest and rest[0] != "--":
        options.usage_error(f"unrecognized arguments: {' '.join(rest)}")
    if not options.tool or not options.tool[0]:
        options.usage_error("argument -m: must not be empty")
    module, *arguments = [*options.tool, *rest]
    argv, path = sys.argv, sys.path
    # As for `python -m`, the module may lie in the current folder.
    sys.argv, sys.path = [module, *arguments], [os.getcwd(), *path]
    try:
        if problem := _problem_of(module):
            complain(problem)
            return 1
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.argv, sys.path = argv, path
    return 0


def _problem_of(module: str) -> str | None:
    """Say why there is nothing to run, if there is no such module."""
    if module.startswith("."):
        return f"-m: must be an absolute name, got {module}"
    try:
        spec = find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:
            module = f"{module}.__main__"
            spec = find_spec(module)
    except ModuleNotFoundError as error:
        # Any other module that is missing is one that the tool imports.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        spec = None
    return f"-m: there is no module {module}" if spec is None else None

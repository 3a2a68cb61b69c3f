"""``sae-lens-scale convert``: checkpoints of other code in SAELens's format."""

import argparse
import shlex
from typing import Any

from sae_lens_scale.loading import convert_authors_checkpoint
from sae_lens_scale.loading.formats import FORMATS

from .arguments import filled, path, positive
from .output import note


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of an argparse parser."""
    names = ", ".join(form.name for form in FORMATS)
    parser = commands.add_parser(
        "convert",
        help="convert a checkpoint of the authors' code to SAELens's format",
        description=f"Convert a checkpoint of the authors' code ({names}) to a folder "
        "that SAE.load_from_disk reads.",
    )
    parser.add_argument("source", type=path, help="their file, or the folder of it")
    parser.add_argument("target", type=path, help="folder to create")
    parser.add_argument(
        "--k",
        type=positive,
        help="latents kept per token; this and the next two by default from the "
        "config.json beside the file",
    )
    parser.add_argument(
        "--experts_per_token",
        type=positive,
        help="experts that each token selects",
    )
    parser.add_argument(
        "--heaviside",
        action=argparse.BooleanOptionalAction,
        help="whether its gates are 1",
    )
    parser.add_argument(
        "--model_name", type=filled, help="language model, for the metadata"
    )
    parser.add_argument("--hook_name", type=filled, help="its hook, for the metadata")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> str:
    folder = convert_authors_checkpoint(
        options.source,
        options.target,
        k=options.k,
        experts_per_token=options.experts_per_token,
        heaviside=options.heaviside,
        model_name=options.model_name,
        hook_name=options.hook_name,
    )
    note(f"next: sae-lens-scale info {shlex.quote(str(folder))}")
    return str(folder)

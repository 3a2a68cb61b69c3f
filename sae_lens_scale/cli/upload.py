"""``sae-lens-scale upload``: an export and its model card on the Hugging Face hub."""

import argparse
from typing import Any

from sae_lens_scale.loading.hub import METRICS_FILENAME, upload

from .arguments import filled, path


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of an argparse parser."""
    parser = commands.add_parser(
        "upload",
        help="upload an SAE to the Hugging Face hub, with a model card",
        description="Upload an export with SAELens, and describe it in the repository's "
        "model card. Log in first, with `hf auth login` or HF_TOKEN.",
    )
    parser.add_argument("sae", type=path, help="folder of the export")
    parser.add_argument("repo", type=filled, help="OWNER/NAME, made if there is none")
    parser.add_argument(
        "sae_id",
        type=filled,
        nargs="?",
        help="name of the SAE in it, by default the folder's",
    )
    parser.add_argument(
        "--metrics",
        type=path,
        help="what `evaluate --output` wrote, for the card; by default "
        f"{METRICS_FILENAME} in the folder, if there is one",
    )
    parser.add_argument(
        "--private", action="store_true", help="make the repository private"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> str:
    return upload(
        options.sae,
        options.repo,
        options.sae_id,
        metrics=options.metrics,
        private=options.private,
    )

"""``sae-lens-scale explore``: a page to explore an SAE with."""

import argparse
from pathlib import Path
from typing import Any

from sae_lens_scale.analysis import explorer
from sae_lens_scale.files import write_whole

from .arguments import filled, path, positive
from .output import note, require_output
from .sae_argument import add_sae
from .sae_on_text import (
    add_options,
    load_asked,
    load_model_of,
    open_text,
    require_datasets,
)


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of an argparse parser."""
    parser = commands.add_parser(
        "explore",
        help="write a page to explore an SAE with",
        description="Run an SAE over a text and write one HTML file, for a browser "
        "without a network: experts, their latents, the contexts that fire these, and "
        "their tokens.",
    )
    add_sae(parser)
    add_options(parser)
    parser.add_argument(
        "--tokens",
        type=positive,
        default=100_000,
        help="tokens of the text at least, if it has so many (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt",
        type=filled,
        action="append",
        default=[],
        help="a text to show beside the others; may be given several times",
    )
    parser.add_argument(
        "--output",
        type=path,
        default=Path("explorer.html"),
        help="the page (default: %(default)s)",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> str:
    # A wrong name, or file, is an error now, not after the language model's pass.
    require_output(options.output)
    require_datasets(options.dataset or ())
    asked = load_asked(options, options.sae, options.sae_id)
    # As of any option, the last counts.
    dataset, size = asked.datasets[-1], asked.context_sizes[-1]
    model = load_model_of(asked, options.device)
    prompts = min(options.batch_size_prompts, -(-options.tokens // size))
    store = open_text(asked, model, dataset, size, prompts)
    batches = -(-options.tokens // (prompts * size))
    note(
        f"reading {batches} batches of {prompts} passages of {size} tokens of {dataset}; "
        "fewer --tokens shorten it"
    )
    html = explorer(
        model,
        asked.sae,
        store,
        prompts=options.prompt,
        max_batches=batches,
        exclude_special_tokens=asked.exclude_special_tokens,
    )
    write_whole(options.output, html)
    return f"{options.output}, {len(html.encode()) / 1e6:.1f} MB: open it in a browser"

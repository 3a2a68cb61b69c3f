"""``sae-lens-scale cache``: a language model's activations on disk, for ``train``."""

import argparse
from typing import Any

from sae_lens_scale.cache.writing import cache_activations, cache_bytes
from sae_lens_scale.distributed import is_launched

from .output import note, print_result
from .train import add_options, with_recipe


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of an argparse parser."""
    parser = commands.add_parser(
        "cache",
        help="keep a language model's activations on disk, for train",
        description="Run the language model on the first --training_tokens of a text, and keep "
        "its activations in the folder --cached_activations_path, from which train, with the "
        "same options and --use_cached_activations true, trains any number of SAEs. The "
        "options are those of train; only those of the model, hook, text and contexts matter. "
        "An interrupted cache goes on where it stood.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.set_defaults(format_help=parser.format_help)
    add_options(parser)


def run(options: argparse.Namespace, arguments: list[str]) -> None:
    """
    Cache, with the rest of the command line for SAELens's parser.

    Raises:
        SystemExit: If SAELens's parser is asked for help or refuses an argument.
        ValueError: If the recipe cannot be made for these sizes; and as
            :func:`.cache_activations`.
        OSError: As that.
    """
    # SAELens takes no options at all for a call for help.
    if not arguments or {"-h", "--help"} & set(arguments):
        print_result(options.format_help())
    if is_launched():
        raise ValueError("cache works on one process, not on those of torchrun")
    cfg = with_recipe(options.recipe, arguments)
    note(
        f"caching {cfg.training_tokens:,} tokens of {cfg.hook_name} of {cfg.model_name} in "
        f"{cfg.cached_activations_path}: {cache_bytes(cfg) / 1e9:,.2f} GB"
    )
    tokens = cache_activations(cfg)
    note(
        f"{tokens:,} tokens are cached; next: sae-lens-scale train, with the same options and "
        "--use_cached_activations true"
    )

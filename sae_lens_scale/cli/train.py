"""``sae-lens-scale train``: SAELens's training command, with our runner and its options."""

import argparse
import contextlib
import io
import math
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.util import str_to_dtype

from sae_lens_scale.distributed import is_launched
from sae_lens_scale.recipes import (
    ARCHITECTURES,
    CONTEXT_SIZE,
    RECIPES,
    recipe_of,
)
from sae_lens_scale.run_settings import SIZES, read_settings
from sae_lens_scale.runner import InterruptibleTrainingRunner
from sae_lens_scale.saes.mixture import MixtureSAEConfig
from sae_lens_scale.upstream import _parse_cfg_args

from .arguments import filled, positive
from .output import complain, error_text, note, print_result

# What a recipe depends on, and the defaults of SAELens's command.
_SIZES = {
    "d_sae": 1024,
    "k": 32,
    "training_tokens": 2_000_000,
    "context_size": CONTEXT_SIZE,
    "train_batch_size_tokens": None,
    "num_experts": None,
    "experts_per_token": None,
}
# Other names of options in SAELens's parser.
_ALIASES = {"architecture": "sae"}
# Of what the run saves; with "None" it does not.
_FOLDERS = ("checkpoint_path", "output_path")
# An empty one, such as a variable that the shell does not know, is no name.
_NAMES = (
    "model_name",
    "model_class_name",
    "hook_name",
    "dataset_path",
    "cached_activations_path",
    "from_pretrained_path",
    "resume_from_checkpoint",
    "checkpoint_path",
    "output_path",
)


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of an argparse parser."""
    # SAELens's parser reads everything else that follows, --help included.
    parser = commands.add_parser(
        "train",
        help="train an SAE with SAELens's runner",
        description="Options besides those of SAELens's runner, which follow. "
        "`train --architecture scale --help` has the SAE's own, such as --k. The model "
        '"smollm2" (from PyPI) and the text "docstrings" (of the installed packages) '
        "need no hub.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.set_defaults(format_help=parser.format_help)
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options besides those of SAELens's runner."""
    parser.add_argument(
        "--recipe",
        choices=[*RECIPES, "none"],
        help="settings for what the other options leave open, chosen by d_sae, k and "
        "training_tokens: those that reconstructed well in short runs (recommended), those "
        "of the architecture's authors (paper), or SAELens's defaults (none); scale and "
        "switch have recipes, recommended by default, other architectures none",
    )
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
        "b_enc=0.5 (the router has --router_lr_factor besides); with "
        "--resume_from_checkpoint the checkpoint's, unless some are given",
    )
    parser.add_argument(
        "--expert_parallel",
        type=positive,
        metavar="N",
        help="where torchrun starts this command (docs/scale-out.md): number of neighbouring "
        "processes that share out the experts; by default all processes hold all of them",
    )
    parser.add_argument(
        "--process_timeout",
        type=positive,
        metavar="SECONDS",
        help="likewise: longest wait for another process (by default torch's, of 10 minutes on "
        "GPUs and 30 without)",
    )


def run(options: argparse.Namespace, arguments: list[str]) -> None:
    """
    Train, with our own options and the rest of the command line, for SAELens's parser.

    Raises:
        SystemExit: If SAELens's parser is asked for help or refuses an argument.
        ValueError: If the recipe cannot be made for these sizes, or the architecture has
            none; and as :class:`.InterruptibleTrainingRunner`.
        OSError: Likewise.
    """
    # SAELens takes no options at all for a call for help.
    if not arguments or {"-h", "--help"} & set(arguments):
        print_result(options.format_help())
    seconds = options.process_timeout
    for name in ("expert_parallel", "process_timeout"):
        if getattr(options, name) and not is_launched():
            raise ValueError(
                f"--{name} is for several processes: torchrun -m sae_lens_scale train ..."
            )
    cfg = with_recipe(options.recipe, arguments)
    note(_plan(cfg))
    settings: dict[str, Any] = {
        "fused_optimizer": options.fused_optimizer,
        # None leaves them to the checkpoint that the run goes on from.
        "lr_factors": dict(options.lr_factors) or None,
    }
    if is_launched():
        # Here: a build of torch without its distributed package trains on one process.
        from sae_lens_scale.distributed.runner import DistributedTrainingRunner

        DistributedTrainingRunner(
            cfg,
            expert_parallel=options.expert_parallel or 1,
            timeout=None if seconds is None else timedelta(seconds=seconds),
            **settings,
        ).run()
    else:
        InterruptibleTrainingRunner(cfg, **settings).run()
    if cfg.output_path is not None:
        note(f"next: sae-lens-scale evaluate {shlex.quote(str(cfg.output_path))}")


def _plan(cfg: Any) -> str:
    """Say what a run will take: tokens, steps, experts, and memory for the SAE."""
    sae, batch = cfg.sae, cfg.train_batch_size_tokens
    experts = ""
    if isinstance(sae, MixtureSAEConfig):
        experts = (
            f" in {sae.num_experts} experts, {sae.experts_per_token} per token "
            f"({sae.num_shared_experts} shared)"
        )
    # Encoder and decoder; besides the weights their gradients and Adam's two moments.
    size = 2 * sae.d_in * sae.d_sae * 4 * str_to_dtype(sae.dtype).itemsize
    return (
        f"training on {cfg.training_tokens:,} tokens in "
        f"{math.ceil(cfg.training_tokens / batch):,} steps of {batch:,}: {sae.d_sae:,} "
        f"latents{experts}, about {size / 1e9:,.2f} GB with gradients and Adam's moments; "
        "SAELens's bar says how long, every 100 steps"
    )


def with_recipe(name: Any, arguments: Sequence[str]) -> Any:
    """
    Parse the options for SAELens, with those of a recipe in front: what is given overrides it.

    Args:
        name: The recipe, or None for the default.
        arguments: The options.

    Returns:
        SAELens's config of the run.

    Raises:
        SystemExit: If SAELens's parser is asked for help or refuses an argument.
        ValueError: If the recipe cannot be made for these sizes, or the architecture has none.
    """
    if {"-h", "--help"} & set(arguments):
        return _parse(arguments)
    names = dict.fromkeys(("architecture", "device"), str)
    given = _read(arguments, {**names, **dict.fromkeys(_NAMES, filled)})
    architecture = given["architecture"] or "standard"
    pretrained = given["from_pretrained_path"]
    is_fresh = pretrained is None and architecture in ARCHITECTURES
    if name not in (None, "none") and not is_fresh:
        raise ValueError(
            f"--recipe {name} is for fresh SAEs of the architectures "
            f"{', '.join(ARCHITECTURES)}, got {pretrained or architecture}"
        )
    if pretrained is not None:
        saved = read_settings(
            "from_pretrained_path", Path(pretrained, SAE_CFG_FILENAME)
        )
        # Its parser knows no options of another architecture, which the runner refuses.
        if given["architecture"] in (None, saved.get("architecture")):
            sizes = {n: saved[n] for n in SIZES if n in saved}
            arguments = [*_flags(sizes), *arguments]
            architecture = sizes.get("architecture", architecture)
    if name == "none" or pretrained is not None or architecture not in ARCHITECTURES:
        cfg = _parse(arguments)
        if cfg.sae.architecture() != architecture:
            # SAELens's parser takes the abbreviation, and trains its default.
            raise ValueError(f"write --architecture {architecture} in full")
        return cfg
    # A config made of the sizes alone may be invalid: the recipe divides the latents.
    sizes = _read(arguments, dict.fromkeys(_SIZES, positive))
    chosen = {n: sizes[n] or default for n, default in _SIZES.items()}
    # The CPU reads the text while the GPU works.
    prefetch = (given["device"] or "cpu").startswith("cuda")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        recipe = recipe_of(
            name or "recommended", architecture, **chosen, prefetch=prefetch
        )
    for warning in warned:
        note(str(warning.message))
    settings = recipe.runner | recipe.sae
    cfg = _parse([*_flags(settings), *arguments])
    used = {n: _field(cfg, n) for n in settings}
    lines = [
        f"  {n} {used[n]}" + ("" if used[n] == v else f" (given; the recipe's is {v})")
        for n, v in settings.items()
    ]
    note("\n".join([f"recipe {name or 'recommended'} for {architecture}:", *lines]))
    return cfg


def _read(
    arguments: Sequence[str], types: Mapping[str, Callable[[str], Any]]
) -> dict[str, Any]:
    """Read some options by their types; None for those that are left out."""
    # Abbreviations, too, as SAELens's parser takes them.
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    for name, kind in types.items():
        names = (name, _ALIASES[name]) if name in _ALIASES else (name,)
        parser.add_argument(*(f"--{n}" for n in names), type=kind)
    with _errors_in_one_line():
        return vars(parser.parse_known_args(arguments)[0])


def _flags(settings: dict[str, Any]) -> list[str]:
    return [part for n, v in settings.items() for part in (f"--{n}", str(v))]


def _field(cfg: Any, name: str) -> Any:
    """A field of the runner's config, or of the SAE's."""
    return getattr(cfg if hasattr(cfg, name) else cfg.sae, name)


def _parse(arguments: Sequence[str]) -> Any:
    try:
        with _errors_in_one_line():
            cfg = _parse_cfg_args(arguments)
    except ZeroDivisionError as error:
        # SAELens divides by them in its message about the run to come.
        raise ValueError(
            "train_batch_size_tokens, feature_sampling_window and wandb_log_frequency "
            "must be positive, got 0"
        ) from error
    for name, folder in _read(arguments, dict.fromkeys(_FOLDERS, str)).items():
        # To SAELens's parser it is a folder's name.
        if folder == "None":
            setattr(cfg, name, None)
    return cfg


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Leave out the usage that argparse, SAELens's of over a hundred options, prints."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except argparse.ArgumentError as error:
        complain(error_text(error))
        raise SystemExit(2) from error
    except SystemExit as stop:
        if stop.code:
            complain(printed.getvalue().strip().rsplit("error: ", 1)[-1])
        raise
    # It is none where the caller has closed it.
    if sys.stderr is not None:
        sys.stderr.write(printed.getvalue())


def _lr_factor(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    factor = math.nan
    with contextlib.suppress(ValueError):
        factor = float(number)
    if not name or not 0 <= factor < math.inf:
        raise argparse.ArgumentTypeError(
            "must be NAME=FACTOR, such as b_enc=0.5, with a finite factor of at least "
            f"0, got {text!r}"
        )
    return name, factor

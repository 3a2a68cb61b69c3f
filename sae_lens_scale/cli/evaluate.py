"""``sae-lens-scale evaluate``: SAELens's evaluation of SAEs."""

import argparse
from collections.abc import Iterator
from itertools import count, product
from pathlib import Path
from typing import Any

import pandas as pd
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_scale.files import dump_json, write_whole

from .arguments import filled, path, positive
from .output import note, require_output, table
from .sae_on_text import (
    Asked,
    LanguageModels,
    add_options,
    find_evaluable,
    load_evaluable,
    noting_repetition,
    open_text,
)

# Of EvalConfig, and what each measures.
_SWITCHES = {
    "compute_kl": "KL divergence of the language model's predictions with the SAE from "
    "those without",
    "compute_ce_loss": "cross-entropy with and without the SAE, and loss recovered",
    "compute_l2_norms": "norms of reconstructions and of activations",
    "compute_sparsity_metrics": "L0 and L1",
    "compute_variance_metrics": "explained variance, squared error, cosine similarity",
    "compute_featurewise_density_statistics": "how often each latent fires, for --output",
    "compute_featurewise_weight_based_metrics": "measures of each latent's weights, for "
    "--output",
}
# Those of metrics that are measured with the SAE spliced into the language model.
_RECONSTRUCTION = {"compute_kl", "compute_ce_loss"}
# Computed from the weights alone.
_WEIGHTS = {"compute_featurewise_weight_based_metrics"}
_ADVICE = (
    "; smaller --n_eval_reconstruction_batches and --n_eval_sparsity_variance_batches "
    "shorten it"
)
_OF_EACH_LATENT = _WEIGHTS | {"compute_featurewise_density_statistics"}


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of an argparse parser."""
    parser = commands.add_parser(
        "evaluate",
        help="run SAELens's evaluation on SAEs",
        description="Run SAELens's evaluation on each SAE, each text and each context "
        "size. With any --compute_ options, only the metrics that these name.",
    )
    parser.add_argument(
        "saes",
        type=filled,
        nargs="+",
        metavar="sae",
        help="folders on disk; or a release of SAELens and an SAE of it, each a name or "
        "a regular expression; or a repository on the hub and an SAE in it",
    )
    add_options(parser)
    parser.add_argument(
        "--datasets",
        dest="dataset",
        type=filled,
        nargs="+",
        action="extend",
        help="several texts",
    )
    parser.add_argument(
        "--ctx_lens",
        dest="context_size",
        type=positive,
        nargs="+",
        action="extend",
        help="several context sizes",
    )
    parser.add_argument(
        "--n_eval_reconstruction_batches",
        type=positive,
        default=10,
        help="batches for cross-entropy and KL divergence (default: %(default)s)",
    )
    parser.add_argument(
        "--n_eval_sparsity_variance_batches",
        type=positive,
        default=10,
        help="batches for all else (default: %(default)s)",
    )
    for name, measured in _SWITCHES.items():
        parser.add_argument(
            f"--{name}",
            action="append_const",
            const=name,
            dest="compute",
            help=measured,
        )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--output",
        type=path,
        help="also write JSON with all metrics, those of each latent included, here; or, "
        "if it ends in .csv, a table with a row for each evaluation; written anew after "
        "each of them",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> str:
    output: Path | None = options.output
    if output is not None:
        require_output(output)
    if output is None or _is_table(output):
        for name in options.compute or ():
            if name in _OF_EACH_LATENT:
                raise ValueError(f"--{name} needs --output, and JSON there, not CSV")
    # A pipe or a device would get one file after the other.
    once = output is not None and output.exists() and not output.is_file()
    results = []
    for result in _results(options):
        results.append(result)
        if output is not None and not once:
            _write(output, results)
    if output is None:
        note("--output FILE keeps the metrics, in JSON those of each latent too")
    else:
        if once:
            _write(output, results)
        note(f"the metrics are in {output}")
    if len(results) == 1:
        summaries = [results[0]["metrics"]]
    else:
        summaries = [_summary(result) for result in results]
    if not options.json:
        return table(*summaries)
    return dump_json(summaries if len(results) > 1 else summaries[0])


def _is_table(output: Path) -> bool:
    return output.suffix.lower() == ".csv"


def _write(output: Path, results: list[dict[str, Any]]) -> None:
    if _is_table(output):
        summaries = [_summary(result) for result in results]
        text = pd.json_normalize(summaries).to_csv(index=False)
    else:
        text = dump_json(results if len(results) > 1 else results[0])
    write_whole(output, text)


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    """Names of a result's SAE, text and settings, and its metrics but those of each latent."""
    names = ("sae", "sae_id")
    cfg = {name: result["eval_cfg"][name] for name in ("dataset", "context_size")}
    return {name: result[name] for name in names} | cfg | result["metrics"]


def _results(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Evaluate each SAE on each text with each context size."""
    saes = find_evaluable(options)
    cfg = _eval_config(options)
    numbers = count(1)
    # Where none is given there is one, the SAE's own.
    n_texts, n_sizes = (
        len(given) if given else 1 for given in (options.dataset, options.context_size)
    )
    total = len(saes) * n_texts * n_sizes
    prompts = options.batch_size_prompts
    models = LanguageModels(options.device)
    for name, sae_id in saes:
        asked = load_evaluable(options, name, sae_id)
        # The store holds the model, too.
        model = store = None
        model = models.of(asked)
        combinations = list(product(asked.datasets, asked.context_sizes))
        for dataset, size in combinations:
            store = open_text(asked, model, dataset, size, prompts)
        for dataset, size in combinations:
            number = next(numbers)
            note(
                f"evaluation {number} of {total}: "
                f"{' '.join(filter(None, (name, sae_id)))} on {dataset}, "
                f"{_cost(cfg, size)}{_ADVICE if number == 1 else ''}"
            )
            store = open_text(asked, model, dataset, size, prompts)
            with noting_repetition(store, dataset):
                by_group, by_latent = _evaluate(asked, model, store, cfg)
            yield {
                "sae": name,
                "sae_id": sae_id,
                "sae_cfg": asked.sae_cfg,
                "eval_cfg": {
                    "dataset": dataset,
                    "context_size": size,
                    "prepend_bos": asked.sae.cfg.metadata.prepend_bos,
                    **vars(cfg),
                },
                "metrics": by_group,
                "feature_metrics": by_latent,
            }


def _eval_config(options: argparse.Namespace) -> EvalConfig:
    switches = set(options.compute or _SWITCHES)
    # No batches where nothing is measured on them: SAELens reports how many tokens were.
    reconstruction = switches & _RECONSTRUCTION
    others = switches - _RECONSTRUCTION - _WEIGHTS
    cfg = EvalConfig(batch_size_prompts=options.batch_size_prompts)
    cfg.n_eval_reconstruction_batches = (
        options.n_eval_reconstruction_batches if reconstruction else 0
    )
    cfg.n_eval_sparsity_variance_batches = (
        options.n_eval_sparsity_variance_batches if others else 0
    )
    for name in switches:
        setattr(cfg, name, True)
    return cfg


def _cost(cfg: EvalConfig, context_size: int) -> str:
    batches = cfg.n_eval_reconstruction_batches + cfg.n_eval_sparsity_variance_batches
    prompts = cfg.batch_size_prompts or 0
    return (
        f"{batches} batches of {prompts} prompts of {context_size} tokens, "
        f"{batches * prompts * context_size:,} tokens"
    )


def _evaluate(
    asked: Asked, model: Any, store: ActivationsStore, cfg: EvalConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run SAELens's evaluation: metrics by group, and those of each latent."""
    by_group, by_latent = run_evals(
        asked.sae,
        store,
        model,
        ActivationScaler(),
        cfg,
        exclude_special_tokens=asked.exclude_special_tokens,
        verbose=True,
    )
    if not cfg.compute_featurewise_density_statistics:
        # SAELens leaves quotients of zeros.
        for name in ("feature_density", "consistent_activation_heuristic"):
            by_latent.pop(name, None)
    return by_group, by_latent

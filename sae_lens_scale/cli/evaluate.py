"""``sae-lens-scale evaluate``: SAELens's evaluation of SAEs."""

import argparse
import gc
from collections.abc import Iterator
from itertools import count, product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sae_lens import SAE
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, DTYPE_MAP
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.load_model import load_model
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_scale.files import dump_json, require_writable, write_whole
from sae_lens_scale.loading.docstrings import docstring_corpus
from sae_lens_scale.loading.errors import (
    first_prompt,
    naming_model,
    naming_text,
    require_context,
    require_hook,
    require_text,
)
from sae_lens_scale.loading.smollm2 import HUB_NAME, load_smollm2

from .arguments import filled, path, positive
from .output import note, table
from .sae_argument import find_saes, load_sae

_SCALED_BY_THE_TRAINER = ("expected_average_only_in", "covariance_whitening")
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
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--dtype",
        choices=list(DTYPE_MAP),
        help="by default the SAE's own on disk, float32 from the hub",
    )
    parser.add_argument(
        "--model",
        type=filled,
        help="language model, by default the one that the SAE was trained on: a name "
        'or folder that SAELens can load, or "smollm2" (from PyPI, no hub needed)',
    )
    parser.add_argument(
        "--model_class_name",
        type=filled,
        help="SAELens's model class, such as AutoModelForCausalLM",
    )
    # An option with several values would take the SAE that follows it for one.
    parser.add_argument(
        "--dataset",
        type=filled,
        action="append",
        help="text, by default what the SAE was trained on: a name or folder that "
        'datasets can load, or "docstrings" (the held-out ones of the installed packages)',
    )
    parser.add_argument(
        "--datasets",
        dest="dataset",
        type=filled,
        nargs="+",
        action="extend",
        help="several texts",
    )
    parser.add_argument(
        "--context_size",
        type=positive,
        action="append",
        help="tokens per prompt, by default as in training",
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
        "--prepend_bos",
        action=argparse.BooleanOptionalAction,
        help="whether prompts begin with the BOS token, by default as in training",
    )
    parser.add_argument(
        "--batch_size_prompts", type=positive, default=16, help="default: %(default)s"
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
        if not output.parent.is_dir():
            raise FileNotFoundError(f"--output: {output.parent} is no folder")
        if output.is_dir():
            raise IsADirectoryError(f"--output: {output} is a folder")
        if not output.exists() or output.is_file():
            # It is replaced by a new one.
            require_writable("--output", output.parent)
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


def _write(output: Path, results: list[dict[str, Any]]) -> None:
    if output.suffix == ".csv":
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
    saes = find_saes(options.saes)
    # A wrong name, or file, is an error now, not after hours.
    for dataset in options.dataset or ():
        _require_text(dataset)
    if len(saes) > 1:
        for name, sae_id in saes:
            _load(options, name, sae_id)
    cfg = _eval_config(options)
    numbers = count(1)
    # Where none is given there is one, the SAE's own.
    n_texts, n_sizes = (
        len(given) if given else 1 for given in (options.dataset, options.context_size)
    )
    total = len(saes) * n_texts * n_sizes
    model = store = loaded = None
    for name, sae_id in saes:
        sae, sae_cfg, datasets, sizes, wanted = _load(options, name, sae_id)
        if wanted != loaded:
            # Released first, by its store too, and collected, for its parts refer to each
            # other: there may be no memory for two.
            model = store = None
            gc.collect()
            model, loaded = _load_model(options.device, *wanted), wanted
        texts = {
            dataset: docstring_corpus("test") if dataset == "docstrings" else dataset
            for dataset in datasets
        }
        metadata = sae.cfg.metadata
        hook = (metadata.hook_name, metadata.hook_head_index, sae.cfg.d_in)
        for dataset, size in product(datasets, sizes):
            require_context("--context_size", size, model)
            store, prompt = _store(sae, model, dataset, texts[dataset], size, cfg)
            require_hook(model, wanted[0], prompt, *hook)
        for dataset, size in product(datasets, sizes):
            note(
                f"evaluation {next(numbers)} of {total}: "
                f"{' '.join(filter(None, (name, sae_id)))} on {dataset}, "
                f"{_cost(cfg, size)}"
            )
            store, _ = _store(sae, model, dataset, texts[dataset], size, cfg)
            by_group, by_latent = _evaluate(sae, model, store, dataset, cfg)
            yield {
                "sae": name,
                "sae_id": sae_id,
                "sae_cfg": sae_cfg,
                "eval_cfg": {
                    "dataset": dataset,
                    "context_size": size,
                    "prepend_bos": metadata.prepend_bos,
                    **vars(cfg),
                },
                "metrics": by_group,
                "feature_metrics": by_latent,
            }


def _load(
    options: argparse.Namespace, name: str, sae_id: str | None
) -> tuple[SAE[Any], dict[str, Any], list[str], list[int], tuple[Any, ...]]:
    """Load an SAE: itself, its config as it is on disk, and its :func:`_settings`."""
    sae = load_sae(name, sae_id, options.device, options.dtype)
    if sae.cfg.normalize_activations in _SCALED_BY_THE_TRAINER:
        _fold_scaler(sae, Path(name, ACTIVATION_SCALER_CFG_FILENAME))
    # Before options change what it says of prompts.
    sae_cfg = sae.cfg.to_dict()
    return sae, sae_cfg, *_settings(options, name, sae)


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


def _settings(
    options: argparse.Namespace, name: str, sae: SAE[Any]
) -> tuple[list[str], list[int], tuple[Any, ...]]:
    """Texts, context sizes and what makes the model: as given or as in the metadata."""
    metadata = sae.cfg.metadata
    datasets = options.dataset
    if datasets is None:
        datasets = [_recorded(sae, "dataset_path", str, "dataset")]
        _require_text(datasets[0])
    sizes = options.context_size or [_recorded(sae, "context_size", int)]
    if options.prepend_bos is not None:
        metadata.prepend_bos = options.prepend_bos
    # A prompt of a BOS alone, or of one token, predicts nothing.
    least = 3 if _recorded(sae, "prepend_bos", bool) else 2
    if min(sizes) < least:
        raise ValueError(
            f"--context_size must be at least {least}: a token, the one that it predicts"
            f"{' and the BOS' if least == 3 else ''}, got {min(sizes)}"
        )
    if not metadata.hook_name:
        raise ValueError(
            f"{name}: the SAE's metadata name no hook (convert takes it as --hook_name)"
        )
    out = metadata.hook_name_out or metadata.hook_name
    if out != metadata.hook_name:
        # SAELens would put the output in the place of the input.
        raise ValueError(
            f"{name} must be an SAE of one hook, got a transcoder from "
            f"{metadata.hook_name} to {out}"
        )
    model = (
        options.model or _recorded(sae, "model_name", str, "model"),
        options.model_class_name or metadata.model_class_name or "HookedTransformer",
        metadata.model_from_pretrained_kwargs,
    )
    return datasets, sizes, model


def _recorded(sae: SAE[Any], name: str, kind: type, option: str | None = None) -> Any:
    """Take a value from the SAE's metadata for which no option was given."""
    value = sae.cfg.metadata[name]
    if value is None or value == "":
        raise ValueError(f"--{option or name} is needed: the SAE's metadata name none")
    if not isinstance(value, kind):
        raise ValueError(
            f"--{option or name} is needed: {name} must be of type {kind.__name__} in "
            f"the SAE's metadata, got {value!r}"
        )
    return value


def _store(
    sae: SAE[Any],
    model: Any,
    dataset: str,
    text: Any,
    context_size: int,
    cfg: EvalConfig,
) -> tuple[ActivationsStore, torch.Tensor]:
    """A store at the beginning of a text, and its first prompt, ``[1, context_size]``."""
    metadata = sae.cfg.metadata
    with naming_text("--dataset", dataset):
        store = ActivationsStore.from_sae(
            model,
            sae,
            dataset=text,
            context_size=context_size,
            store_batch_size_prompts=cfg.batch_size_prompts or 1,
            # Against a warning that a training run would need more.
            total_tokens=0,
            device=str(sae.device),
            disable_concat_sequences=bool(metadata.disable_concat_sequences),
            sequence_separator_token=metadata.get("sequence_separator_token", "bos"),
        )
    return store, first_prompt(f"--dataset {dataset}", store)


def _evaluate(
    sae: SAE[Any], model: Any, store: ActivationsStore, dataset: str, cfg: EvalConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run SAELens's evaluation: metrics by group, and those of each latent."""
    first_reading = store.iterable_sequences
    exclude = sae.cfg.metadata.exclude_special_tokens
    by_group, by_latent = run_evals(
        sae,
        store,
        model,
        ActivationScaler(),
        cfg,
        exclude_special_tokens=True if exclude is None else exclude,
        verbose=True,
    )
    if store.iterable_sequences is not first_reading:
        note(f"{dataset} has less text than that: some was read more than once")
    if not cfg.compute_featurewise_density_statistics:
        # SAELens leaves quotients of zeros.
        for name in ("feature_density", "consistent_activation_heuristic"):
            by_latent.pop(name, None)
    return by_group, by_latent


def _require_text(dataset: str) -> None:
    if dataset != "docstrings":
        require_text("--dataset", dataset)


def _fold_scaler(sae: SAE[Any], path: Path) -> None:
    # A training checkpoint expects activations as the trainer had scaled them.
    scaler = ActivationScaler()
    if path.exists():
        scaler.load(path)
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if scaler.whitening is not None:
        sae.fold_activation_whitening(
            scaler.whitening.mean,
            scaler.whitening.matrix,
            scaler.whitening.inverse_matrix,
        )
    # Each fold sets it to "none".
    if sae.cfg.normalize_activations in _SCALED_BY_THE_TRAINER:
        raise ValueError(
            f"{path} is missing or incomplete: it does not say how activations were "
            f"scaled (normalize_activations={sae.cfg.normalize_activations!r})"
        )


def _load_model(
    device: str, name: str, class_name: str, settings: dict[str, Any] | None
) -> Any:
    if name == "smollm2" or (name, class_name) == (HUB_NAME, "HookedTransformer"):
        return load_smollm2(device=device)
    with naming_model("--model", name):
        return load_model(
            class_name, name, device=device, model_from_pretrained_kwargs=settings
        )

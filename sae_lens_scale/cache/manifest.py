"""Manifest of a cache: what its activations are of, and how many tokens there are."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sae_lens.config import LanguageModelSAERunnerConfig

from sae_lens_scale.files import read_json, write_whole

MANIFEST = "manifest.json"
# Fields of the runner's config that decide the activations, and which of them are kept.
_SOURCE = (
    "model_name",
    "model_class_name",
    "model_kwargs",
    "model_from_pretrained_kwargs",
    "hook_name",
    "hook_head_index",
    "dataset_path",
    "use_chat_formatting",
    "context_size",
    "seqpos_slice",
    "prepend_bos",
    "disable_concat_sequences",
    "sequence_separator_token",
    "exclude_special_tokens",
    "autocast_lm",
)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """
    Read the manifest of a folder of activations.

    Returns:
        Its fields, among them ``tokens``, which is 0 until caching has finished; None if there
        is none, as in a folder of SAELens's own format.

    Raises:
        ValueError: If it is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path)
    if not (isinstance(manifest, dict) and isinstance(manifest.get("tokens"), int)):
        raise ValueError(f"{path} must say how many tokens there are, got {manifest!r}")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a folder of activations, which is made if it is missing."""
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))


def versions() -> dict[str, str]:
    """Versions of the packages that compute activations, for a manifest."""
    return {name: version(name) for name in ("torch", "sae-lens", "transformer-lens")}


def source_of(cfg: LanguageModelSAERunnerConfig[Any]) -> dict[str, Any]:
    """
    Describe what a run trains on, as JSON has it: the settings that decide its activations.

    Raises:
        TypeError: If JSON has no such value, as of a torch.dtype in
            ``model_from_pretrained_kwargs``; the text names the setting.
    """
    settings = {name: getattr(cfg, name) for name in _SOURCE}
    settings["d_in"] = cfg.sae.d_in
    for name, value in settings.items():
        try:
            settings[name] = json.loads(json.dumps(value))
        except TypeError as error:
            raise TypeError(f"{name} cannot be kept with a cache: {error}") from error
    return settings


def require_source(
    cfg: LanguageModelSAERunnerConfig[Any], folder: Path, manifest: dict[str, Any]
) -> None:
    """
    Refuse a cache of other activations than a run's.

    Args:
        cfg: Config of the run.
        folder: Folder of the cache.
        manifest: Its manifest.

    Raises:
        ValueError: If a setting is another one there, or is not known.
    """
    for name, value in source_of(cfg).items():
        if name not in manifest:
            raise ValueError(f"{folder / MANIFEST} must say {name}, got none")
        if manifest[name] != value:
            raise ValueError(
                f"{name} must be {manifest[name]!r}, as of the activations in {folder}, "
                f"got {value!r}"
            )


def reads_cache(cfg: LanguageModelSAERunnerConfig[Any]) -> bool:
    """Tell whether a run reads a cache of this package, not of SAELens's own format."""
    folder = str(cfg.cached_activations_path)
    return cfg.use_cached_activations and Path(folder, MANIFEST).exists()


def require_cache(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """
    Refuse a cache of this package that a run cannot train on.

    Args:
        cfg: Config of the run, which reads it (:func:`reads_cache`).

    Raises:
        ValueError: As :func:`require_source`; if the cache is not finished, or has not the
            tokens of a training step; if the seed is none of NumPy's.
    """
    folder = Path(str(cfg.cached_activations_path))
    manifest = read_manifest(folder)
    assert manifest is not None
    require_source(cfg, folder, manifest)
    tokens = manifest["tokens"]
    if not tokens:
        raise ValueError(
            f"cached_activations_path {folder} is not finished: cache again with the "
            "settings that it was begun with, to go on from there"
        )
    if tokens < cfg.train_batch_size_tokens:
        raise ValueError(
            f"train_batch_size_tokens must be at most the {tokens} tokens in {folder}, got "
            f"{cfg.train_batch_size_tokens}"
        )
    if not (isinstance(cfg.seed, int) and cfg.seed >= 0):
        raise ValueError(f"seed must be an integer of at least 0, got {cfg.seed!r}")

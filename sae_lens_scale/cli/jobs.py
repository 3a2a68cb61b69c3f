"""SAEs to score, each with its language model, hook and text."""

import argparse
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.load_model import load_model
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_scale.analysis.scores.spread import settings_but_seed
from sae_lens_scale.analysis.scores.stored import digest
from sae_lens_scale.loading.docstrings import docstring_corpus
from sae_lens_scale.loading.errors import (
    first_prompt,
    naming_model,
    naming_text,
    require_text,
)
from sae_lens_scale.loading.smollm2 import load_smollm2

from .sae_argument import load_sae


@dataclass(frozen=True)
class Job:
    """
    An SAE to score.

    Attributes:
        name: Folder, release or repository.
        sae_id: The SAE in a release or repository.
        digest: Name of its config and weights.
        settings: Name of its settings without the seed.
        model: Name, class and settings of its language model.
        hook: Name of its hook.
        text: Name of the text of the reconstruction.
        context_size: Tokens per prompt.
    """

    name: str
    sae_id: str | None
    digest: str
    settings: str
    model: tuple[str, str, dict[str, Any]]
    hook: str
    text: str
    context_size: int

    @property
    def title(self) -> str:
        """Name that the user knows it by."""
        return " ".join(filter(None, (self.name, self.sae_id)))


class Models:
    """Language models, of which one is in memory at a time."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._loaded: Any = None
        self._model: Any = None

    def load(self, name: str, class_name: str, settings: dict[str, Any]) -> Any:
        """Load a model, unless it is the last one."""
        wanted = (name, class_name, settings)
        if wanted != self._loaded:
            # Its parts refer to each other: there may be no memory for two.
            self._model = self._loaded = None
            gc.collect()
            self._model = self._load(*wanted)
            self._loaded = wanted
        return self._model

    def _load(self, name: str, class_name: str, settings: dict[str, Any]) -> Any:
        if name == "smollm2":
            return load_smollm2(device=self._device)
        with naming_model("--model", name):
            return load_model(
                class_name,
                name,
                device=self._device,
                model_from_pretrained_kwargs=settings,
            )


def job_of(options: argparse.Namespace, name: str, sae_id: str | None) -> Job:
    """
    Load an SAE to see that it can be scored, and with which model and text.

    Args:
        options: The command's: model, dataset, context_size, prepend_bos, device.
        name: Folder, release or repository.
        sae_id: The SAE in the release or repository.

    Raises:
        ValueError: If it cannot be scored, or neither the options nor its metadata say how.
    """
    sae = load_sae(name, sae_id, options.device, None)
    metadata = sae.cfg.metadata
    if sae.cfg.normalize_activations in (
        "expected_average_only_in",
        "covariance_whitening",
    ):
        raise ValueError(
            f"{name} must be an SAE for inference, got a training checkpoint whose "
            f"activations the trainer scales "
            f"(normalize_activations={sae.cfg.normalize_activations!r})"
        )
    hook = metadata.hook_name
    if not hook:
        raise ValueError(
            f"{name}: the SAE's metadata name no hook (convert takes it as --hook_name)"
        )
    if (metadata.hook_name_out or hook) != hook or metadata.hook_head_index is not None:
        raise ValueError(
            f"{name} must be an SAE of one hook and of all its heads, got "
            f"hook_name={hook!r}, hook_name_out={metadata.hook_name_out!r}, "
            f"hook_head_index={metadata.hook_head_index!r}"
        )
    context_size = _recorded(sae, name, "context_size", options.context_size, int)
    # A prompt of a BOS alone, or of one token, predicts nothing.
    least = 2 + _recorded(sae, name, "prepend_bos", options.prepend_bos, bool)
    if context_size < least:
        raise ValueError(
            f"{name}: context_size must be at least {least}, a token, the one that it "
            f"predicts, and any BOS, got {context_size}"
        )
    text = _recorded(sae, name, "dataset_path", options.dataset, str, "dataset")
    if text != "docstrings":
        require_text("--dataset", text)
    return Job(
        name,
        sae_id,
        digest(_cfg(sae), sae.state_dict().items()),
        digest(settings_but_seed(sae, Path(name) if sae_id is None else None)),
        (
            _recorded(sae, name, "model_name", options.model, str, "model"),
            metadata.model_class_name or "HookedTransformer",
            metadata.model_from_pretrained_kwargs or {},
        ),
        hook,
        text,
        context_size,
    )


def _cfg(sae: SAE[Any]) -> dict[str, Any]:
    """Return an SAE's config as it is on every device."""
    return {n: value for n, value in sae.cfg.to_dict().items() if n != "device"}


def _recorded(
    sae: SAE[Any], name: str, field: str, given: Any, kind: type, option: str = ""
) -> Any:
    """Take what an option gives, or else what the SAE's metadata say."""
    value = sae.cfg.metadata[field] if given is None else given
    if not isinstance(value, kind) or value == "":
        raise ValueError(
            f"{name}: {field} must be of type {kind.__name__} in the SAE's metadata, or "
            f"given as --{option or field}, got {value!r}"
        )
    return value


def require_different(jobs: Sequence[Job]) -> None:
    """
    Refuse an SAE that is there twice.

    Raises:
        ValueError: If one is.
    """
    by_digest: dict[str, Job] = {}
    for job in jobs:
        other = by_digest.setdefault(job.digest, job)
        if other is not job:
            raise ValueError(
                f"SAEs must differ from each other, got {other.title} and {job.title}"
            )


def store_of(
    options: argparse.Namespace, job: Job, sae: SAE[Any], model: Any
) -> tuple[ActivationsStore, torch.Tensor]:
    """
    Make a store at the beginning of the text, and read its first prompt.

    Returns:
        The store and the prompt, ``[1, context_size]``.

    Raises:
        ValueError: If the text cannot be read, or does not fill a prompt.
    """
    metadata = sae.cfg.metadata
    if options.prepend_bos is not None:
        metadata.prepend_bos = options.prepend_bos
    with naming_text("--dataset", job.text):
        store = ActivationsStore.from_sae(
            model,
            sae,
            dataset=docstring_corpus("test") if job.text == "docstrings" else job.text,
            context_size=job.context_size,
            store_batch_size_prompts=options.batch_size_prompts,
            # Against a warning that a training run would need more.
            total_tokens=0,
            device=str(sae.device),
            disable_concat_sequences=bool(metadata.disable_concat_sequences),
            sequence_separator_token=metadata.get("sequence_separator_token", "bos"),
        )
    return store, first_prompt(f"--dataset {job.text}", store)

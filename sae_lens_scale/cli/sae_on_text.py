"""Options of commands that run an SAE in its language model on a text, and what they mean."""

import argparse
import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from sae_lens.constants import DTYPE_MAP
from sae_lens.load_model import load_model
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_scale.loading.docstrings import docstring_corpus
from sae_lens_scale.loading.errors import (
    first_prompt,
    naming_model,
    naming_text,
    require_context,
    require_hook,
    require_text,
)
from sae_lens_scale.loading.smollm2 import is_smollm2, load_smollm2
from sae_lens_scale.loading.text import skip_missing_texts

from .arguments import filled, positive
from .output import note
from .sae_argument import find_saes, fold_scaler, load_sae


class Asked(NamedTuple):
    """
    An SAE, and the model and texts to run it on, by a command's options and its metadata.

    Attributes:
        sae: The SAE, which takes raw activations.
        sae_cfg: Its config as it is on disk.
        datasets: Names of the texts, one at least.
        context_sizes: Numbers of tokens per prompt, one at least.
        exclude_special_tokens: Tokens that do not count, as SAELens's evaluation takes them.
        model: Name, class and further settings of the language model.
    """

    sae: SAE[Any]
    sae_cfg: dict[str, Any]
    datasets: list[str]
    context_sizes: list[int]
    exclude_special_tokens: bool | list[int]
    model: tuple[str, str, dict[str, Any] | None]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the model and of texts; of these each may be given several times."""
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
    parser.add_argument(
        "--prepend_bos",
        action=argparse.BooleanOptionalAction,
        help="whether prompts begin with the BOS token, by default as in training",
    )
    parser.add_argument(
        "--batch_size_prompts", type=positive, default=16, help="default: %(default)s"
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
        "--context_size",
        type=positive,
        action="append",
        help="tokens per prompt, by default as in training",
    )


def find_evaluable(options: argparse.Namespace) -> Sequence[tuple[str, str | None]]:
    """
    Find the SAEs that a command names, and refuse what cannot be evaluated, or read.

    A wrong name, or file, is an error now, not after hours.

    Args:
        options: Values of :func:`add_options`, and a list ``saes``.

    Returns:
        As :func:`.find_saes`.

    Raises:
        ValueError, FileNotFoundError: If an SAE or a text cannot be loaded.
    """
    names = find_saes(options.saes)
    require_datasets(options.dataset or ())
    if len(names) > 1:
        for name, sae_id in names:
            load_evaluable(options, name, sae_id)
    return names


def load_evaluable(options: argparse.Namespace, name: str, sae_id: str | None) -> Asked:
    """
    Load an SAE that SAELens's evaluation knows how to splice; as :func:`load_asked`.

    Raises:
        ValueError: If it is a transcoder, too.
    """
    asked = load_asked(options, name, sae_id)
    metadata = asked.sae.cfg.metadata
    out = metadata.hook_name_out or metadata.hook_name
    if out != metadata.hook_name:
        # SAELens would put the output in the place of the input.
        raise ValueError(
            f"{name} must be an SAE of one hook, got a transcoder from "
            f"{metadata.hook_name} to {out}"
        )
    return asked


def load_asked(options: argparse.Namespace, name: str, sae_id: str | None) -> Asked:
    """
    Load an SAE, and see what to run it in and on.

    Args:
        options: Values of :func:`add_options`.
        name: Folder, release or repository.
        sae_id: The SAE in the release or repository.

    Raises:
        ValueError: If neither option nor metadata say what is needed; as
            :func:`.load_sae`.
    """
    sae = load_sae(name, sae_id, options.device, options.dtype)
    fold_scaler(sae, name)
    # Before options change what it says of prompts.
    sae_cfg = sae.cfg.to_dict()
    metadata = sae.cfg.metadata
    datasets = options.dataset
    if datasets is None:
        datasets = [_recorded(sae, "dataset_path", str, "dataset")]
        require_datasets(datasets)
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
    model = (
        options.model or _recorded(sae, "model_name", str, "model"),
        options.model_class_name or metadata.model_class_name or "HookedTransformer",
        metadata.model_from_pretrained_kwargs,
    )
    exclude = metadata.exclude_special_tokens
    return Asked(
        sae, sae_cfg, datasets, sizes, True if exclude is None else exclude, model
    )


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


def open_text(
    asked: Asked, model: Any, dataset: str, context_size: int, batch_size_prompts: int
) -> ActivationsStore:
    """
    Begin to read a text for a language model that can be run on it.

    Args:
        asked: The SAE.
        model: Its language model.
        dataset: Name of the text.
        context_size: Tokens per prompt.
        batch_size_prompts: Prompts that the store reads at a time.

    Returns:
        A store at the text's beginning.

    Raises:
        ValueError: If the text cannot be read, or is shorter than one prompt; if the model
            does not take such prompts, or lacks the SAE's hook.
    """
    require_context("--context_size", context_size, model)
    sae = asked.sae
    text = docstring_corpus("test") if dataset == "docstrings" else dataset
    metadata = sae.cfg.metadata
    with naming_text("--dataset", dataset):
        store = ActivationsStore.from_sae(
            model,
            sae,
            dataset=text,
            context_size=context_size,
            store_batch_size_prompts=batch_size_prompts,
            # Against a warning that a training run would need more.
            total_tokens=0,
            device=str(sae.device),
            disable_concat_sequences=bool(metadata.disable_concat_sequences),
            sequence_separator_token=metadata.get("sequence_separator_token", "bos"),
        )
    skip_missing_texts(store)
    prompt = first_prompt(f"--dataset {dataset}", store)
    hook = (metadata.hook_name, metadata.hook_head_index, sae.cfg.d_in)
    require_hook(model, asked.model[0], prompt, *hook)
    return store


@contextmanager
def noting_repetition(store: ActivationsStore, dataset: str) -> Iterator[None]:
    """Say so if a text is read to its end, and then from its beginning."""
    first_reading = store.iterable_sequences
    yield
    if store.iterable_sequences is not first_reading:
        note(f"{dataset} has less text than that: some was read more than once")


def require_datasets(datasets: Iterable[str]) -> None:
    """
    Refuse texts that are in no folder and on no hub.

    Raises:
        ValueError: If there is none of a name.
    """
    for dataset in datasets:
        if dataset != "docstrings":
            require_text("--dataset", dataset)


def load_model_of(asked: Asked, device: str) -> Any:
    """
    Load the language model.

    Raises:
        ValueError: If there is none of that name.
    """
    name, class_name, settings = asked.model
    if is_smollm2(name, class_name):
        return load_smollm2(device=device)
    with naming_model("--model", name):
        return load_model(
            class_name, name, device=device, model_from_pretrained_kwargs=settings
        )


class LanguageModels:
    """Language models of several SAEs, of which one is in memory at a time."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._key: Any = None
        self._model: Any = None

    def of(self, asked: Asked) -> Any:
        """
        Load the language model of an SAE, unless it is the last one's.

        The last one is released first, if the caller holds it no more.

        Raises:
            ValueError: If there is none of that name.
        """
        if asked.model != self._key:
            self._model = self._key = None
            # Its parts refer to each other: without this there may be no memory for two.
            gc.collect()
            self._model = load_model_of(asked, self._device)
            self._key = asked.model
        return self._model

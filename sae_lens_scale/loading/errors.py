"""Errors that name the setting at fault, before any work is done with it."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import Any

import torch
from datasets import load_dataset
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name

from sae_lens_scale.upstream import InterruptedException, model_size

# Those that SAELens's store reads.
_COLUMNS = ("text", "tokens", "input_ids", "problem")
_MODELS = (
    "name a model that TransformerLens knows or, with the model class "
    "AutoModelForCausalLM, a folder or a model of the hub"
)
_TEXTS = f"name a data set of the hub, or its folder, with a column {_COLUMNS[0]!r}"


@contextmanager
def naming_model(setting: str, name: str) -> Iterator[None]:
    """
    Turn any error within into one that says which model could not be loaded.

    Errors of the machine (:func:`is_of_the_machine`) pass as they are.

    Args:
        setting: What the user calls the setting, such as ``--model``.
        name: Its value.

    Raises:
        ValueError: Instead of the error.
    """
    with _naming(setting, name, _MODELS):
        yield


@contextmanager
def naming_text(setting: str, name: str) -> Iterator[None]:
    """Turn any error within into one that says which text; as :func:`naming_model`."""
    with _naming(setting, name, _TEXTS):
        yield


def require_text(setting: str, name: str) -> None:
    """
    Refuse a data set that is missing, or has no column that SAELens reads.

    Args:
        setting: What the user calls the setting.
        name: Name on the hub, or folder.

    Raises:
        ValueError: If it cannot be read.
    """
    with naming_text(setting, name):
        row = next(iter(load_dataset(name, split="train", streaming=True)), {})
        if not set(_COLUMNS) & set(row):
            columns = ", ".join(_COLUMNS)
            raise ValueError(f"of the columns {columns} it has none, but {sorted(row)}")


@contextmanager
def _naming(setting: str, name: str, advice: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_of_the_machine(error):
            raise
        raise ValueError(
            f"{setting} {name} cannot be loaded: {_reason(error)}; {advice}"
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, StopIteration):
        return "it is empty"
    # Some list thousands of models.
    return shorten(str(error), 200, placeholder=" …") or type(error).__name__


def is_of_the_machine(error: BaseException) -> bool:
    """
    Tell what no other name or file would mend: a missing package, a lack of memory, a signal.

    SAELens answers signals with an exception, also after its runners have trained.
    """
    if isinstance(
        error,
        (ImportError, MemoryError, torch.OutOfMemoryError, InterruptedException),
    ):
        return True
    # Torch's error where the CPU's memory is short has no type of its own.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def require_device(setting: str, device: str) -> None:
    """
    Refuse a device on which nothing can be computed.

    Args:
        setting: What the user calls the setting.
        device: Its value.

    Raises:
        ValueError: If torch does not know it, or cannot use it here.
    """
    try:
        torch.zeros(1, device=device).item()
    # Of a build without CUDA it is an AssertionError.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"{setting} {device!r} cannot be used: {_reason(error)}"
        ) from error


def require_context(setting: str, context_size: int, model: Any) -> None:
    """
    Refuse a context that is longer than a language model takes.

    Args:
        setting: What the user calls the setting.
        context_size: Tokens per prompt.
        model: The language model, as SAELens loads it.

    Raises:
        ValueError: If the model says that it takes fewer.
    """
    limit = model_size(model, "n_ctx")
    if limit is not None and context_size > limit:
        raise ValueError(
            f"{setting} must be at most the {limit} tokens that the language model "
            f"takes, got {context_size}"
        )


def require_vocabulary(text: str, ids: torch.Tensor, model: Any) -> None:
    """
    Refuse token ids of another vocabulary than a language model's.

    Args:
        text: Name of their text, or argument, for the message.
        ids: At least one token id.
        model: The language model, as SAELens loads it.

    Raises:
        ValueError: If the model says that it has no such tokens.
    """
    d_vocab = model_size(model, "d_vocab")
    if d_vocab is not None and not 0 <= ids.min() <= ids.max() < d_vocab:
        # Looked up on a GPU, it would end the process.
        raise ValueError(
            f"{text} must hold token ids from 0 to less than {d_vocab}, the language "
            f"model's vocabulary, got {int(ids.min())} to {int(ids.max())}"
        )


def first_prompt(text: str, store: ActivationsStore) -> torch.Tensor:
    """
    Read the first prompt of a text, which stays the first for those who read after this.

    Args:
        text: The text as the message is to name it, such as ``--dataset NAME``.
        store: The store that reads it.

    Returns:
        Its tokens, ``[1, context_size]``, where the language model takes them.

    Raises:
        ValueError: If the text does not fill a prompt, or its tokens are none of the
            language model's.
    """
    rest = store.iterable_sequences
    first = next(rest, None)
    if first is None:
        raise ValueError(
            f"{text} must hold a prompt of {store.context_size} tokens at least, got less"
        )

    def whole() -> Generator[torch.Tensor, None, None]:
        yield first
        yield from rest

    store.iterable_sequences = whole()
    tokens = store.get_batch_tokens(1)
    store.iterable_sequences = whole()
    require_vocabulary(text, tokens, store.model)
    return tokens


def take_heads(
    x: torch.Tensor, head: int | None, hook: str, width: int
) -> torch.Tensor:
    """
    Take the head of activations that an SAE is for, or join all of them.

    Args:
        x: ``[passages, tokens, width]`` or ``[passages, tokens, heads, d_head]``.
        head: The head, or None for all of them.
        hook: Where they are from, for the message.
        width: Width that they must have.

    Returns:
        ``[passages, tokens, width]``.

    Raises:
        ValueError: If there is no such head, or the width is another.
    """
    if head is not None:
        heads = x.shape[2] if x.ndim == 4 else 0
        if head not in range(-heads, heads):
            raise ValueError(
                f"hook_head_index must be one of the {heads} heads at {hook}, got "
                f"{head!r}"
            )
        x = x[:, :, head]
    x = x.flatten(2)
    if x.shape[-1] != width:
        raise ValueError(
            f"the SAE must be as wide as the model at {hook}, {x.shape[-1]}, got {width}"
        )
    return x


@torch.no_grad()
def require_hook(
    model: Any,
    name: str,
    tokens: torch.Tensor,
    hook: str,
    hook_head_index: int | None,
    d_in: int,
    model_kwargs: dict[str, Any] | None = None,
) -> None:
    """
    Refuse a hook that a language model lacks, or whose activations are of another width.

    Args:
        model: The language model.
        name: Its name, for the message.
        tokens: Any tokens, ``[prompts, tokens]``, of which the first is read.
        hook: Name of the hook.
        hook_head_index: The head to take there, or None for all of them.
        d_in: Width of the SAE's input.
        model_kwargs: Arguments of ``run_with_cache`` with which SAELens will call it.

    Raises:
        ValueError: If there is no such hook or head, the width is not ``d_in``, or the
            model takes no such arguments.
    """
    # SAELens's wrapper of a Hugging Face model cannot stop at a module that is not there.
    there = hook in model.hook_dict
    stop = extract_stop_at_layer_from_tlens_hook_name(hook) if there else None
    try:
        # As SAELens's store runs it.
        _, cache = model.run_with_cache(
            tokens[:1, :1],
            names_filter=[hook],
            stop_at_layer=stop,
            prepend_bos=False,
            **(model_kwargs or {}),
        )
    except TypeError as error:
        if not model_kwargs:
            raise
        raise ValueError(
            f"model_kwargs {model_kwargs} do not suit {name}: {_reason(error)}"
        ) from error
    if hook not in set(cache):
        attached = any(n.startswith(f"{hook}.hook_sae") for n in model.hook_dict)
        advice = "; an SAE is attached there, which reset_saes() takes away"
        raise ValueError(
            f"{name} has no hook {hook!r}, the SAE's{advice if attached else ''}"
        )
    take_heads(cache[hook], hook_head_index, hook, d_in)

"""Token ids of a corpus, and other arguments that hold numbers."""

import operator
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import get_special_token_ids

from sae_lens_scale.saes.mixture.config import is_integer

from .language_model import LanguageModel, tokenizer_of

# Source of token ids, in batches [passages, tokens].
Tokens: TypeAlias = (
    ActivationsStore
    | Iterable[torch.Tensor]
    | Iterable[NDArray[Any]]
    | Iterable[Sequence[Sequence[int]]]
)


def token_batches(tokens: Tokens, max_batches: int | None) -> Iterator[torch.Tensor]:
    """
    Read batches of token ids.

    Args:
        tokens: Batches ``[passages, tokens]``, each a tensor, an array or nested lists; or
            a store of SAELens, which is read from where it stands to the end of its data
            set.
        max_batches: Stop after so many.

    Yields:
        Each batch as a tensor, int64.

    Raises:
        ValueError: If ``max_batches`` is less than 1; if ``tokens`` are not such batches.
    """
    if max_batches is not None:
        require_integer("max_batches", max_batches, 1)
    # A store iterates over activations.
    batches = _store_batches(tokens) if isinstance(tokens, ActivationsStore) else tokens
    for batch in islice(require_iterable("tokens", batches), max_batches):
        ids = to_tensor("tokens", batch)
        if ids.ndim != 2 or not ids.numel() or not _holds_integers(ids):
            raise ValueError(
                "tokens must be batches of token ids [passages, tokens], got "
                f"{ids.dtype} of shape {tuple(ids.shape)}"
            )
        ids = ids.long()
        # Some models take them for ids counted from the end of the vocabulary.
        if ids.min() < 0:
            raise ValueError(f"tokens must be at least 0, got {int(ids.min())}")
        yield ids


def _store_batches(store: ActivationsStore) -> Iterator[torch.Tensor]:
    while True:
        try:
            yield store.get_batch_tokens(raise_at_epoch_end=True)
        except StopIteration:
            return


def _holds_integers(ids: torch.Tensor) -> bool:
    return not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)


def excluded_ids(
    model: LanguageModel, exclude_special_tokens: bool | Iterable[int]
) -> torch.Tensor:
    """
    Look up the token ids, int64, that SAELens's ``exclude_special_tokens`` stands for.

    ``True`` is for the tokenizer's BOS, EOS and their like, ``False`` for none; otherwise
    these are the ids themselves.

    Raises:
        ValueError: If the tokenizer is asked for and the model has none; if ids are no
            integers.
    """
    name = "exclude_special_tokens"
    ids: Iterable[int]
    if not isinstance(exclude_special_tokens, (bool, np.bool_)):
        ids = exclude_special_tokens
    elif exclude_special_tokens:
        ids = get_special_token_ids(tokenizer_of(model, f"{name}=True"))
    else:
        ids = []
    return torch.tensor(to_integers(name, ids), dtype=torch.long, device="cpu")


def chosen_latents(latents: Iterable[int], d_sae: int) -> list[int]:
    """
    Read the indices of latents from a list, an array, a tensor, or another iterable.

    Raises:
        ValueError: If one is no integer, out of range or there twice, or there is none.
    """
    chosen = to_integers("latents", latents)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(
            "latents must name at least one latent and none twice, got "
            f"{_brief(chosen)}"
        )
    if min(chosen) < 0 or max(chosen) >= d_sae:
        raise ValueError(f"latents must be in range({d_sae}), got {_brief(chosen)}")
    return chosen


def to_integers(name: str, values: Any) -> list[int]:
    """
    Read integers from a list, an array, a tensor, a Series or another iterable.

    Raises:
        ValueError: If there is anything else in it, or it is nothing of the kind; the
            message begins with the name.
    """
    try:
        # Of arrays and tensors, and of such as are in a list.
        found = values.tolist() if hasattr(values, "tolist") else list(values)
        found = [v.item() if hasattr(v, "item") else v for v in found]
        # Truth values are a mask, which would read as zeros and ones.
        if not any(isinstance(value, bool) for value in found):
            return [operator.index(value) for value in found]
    except (TypeError, ValueError, RuntimeError):
        pass
    raise ValueError(f"{name} must be a list of integers, got {_brief(values)}")


def to_tensor(name: str, values: Any) -> torch.Tensor:
    """
    Make a tensor of an array or of nested lists, and leave one as it is.

    Raises:
        ValueError: If there is none to be made; the message begins with the name.
    """
    if isinstance(values, torch.Tensor):
        return values
    try:
        if isinstance(values, list) and values and isinstance(values[0], torch.Tensor):
            return torch.stack(values)
        # Not on the default device, which may be another than the model's.
        return torch.tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be numbers in tensors, arrays or lists of one length, got "
            f"{_brief(values)}"
        ) from error


def require_iterable(name: str, values: Any) -> Iterable[Any]:
    """
    Refuse a value that cannot be read one after the other.

    Raises:
        ValueError: The message begins with the name.
    """
    try:
        return iter(values)
    except TypeError as error:
        raise ValueError(
            f"{name} must be batches, one after the other, got {_brief(values)}"
        ) from error


def require_integer(name: str, value: Any, least: int) -> int:
    """
    Read an integer of any type, such as NumPy's, whose arithmetic may overflow.

    Raises:
        ValueError: If it is no integer, or too small; the message begins with the name.
    """
    if not is_integer(value):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if int(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def require_number(name: str, value: Any) -> float:
    """
    Read a number of any type, such as NumPy's or a tensor.

    Raises:
        ValueError: If it is no number; the message begins with the name.
    """
    number = value
    if isinstance(value, (np.ndarray, torch.Tensor)) and not value.ndim:
        number = value.item()
    if not isinstance(number, Real) or isinstance(number, bool):
        raise ValueError(f"{name} must be a number, got {_brief(value)}")
    return float(number)


def _brief(value: Any) -> str:
    """Representation of a value that may be long, on one short line."""
    return " ".join(reprlib.repr(value).split())

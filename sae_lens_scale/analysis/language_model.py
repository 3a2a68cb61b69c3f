"""Access to a language model of any kind that SAELens knows: hooks, tokens, text, sizes."""

from typing import Any, Protocol

import torch
from sae_lens import SAE
from transformer_lens.hook_points import HookPoint

from sae_lens_scale.upstream import input_device, model_size, own_hook_name


class LanguageModel(Protocol):
    """
    A HookedTransformer, a SAETransformerBridge, or a Hugging Face model as
    ``sae_lens.load_model`` wraps it, with its tokenizer.
    """

    @property
    def tokenizer(self) -> Any: ...

    @property
    def hook_dict(self) -> dict[str, HookPoint]: ...

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any: ...

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any: ...


def hook_of(model: LanguageModel, sae: SAE[Any], field: str = "hook_name") -> str:
    """
    Find the model's own name for a hook of an SAE.

    Args:
        model: The language model.
        sae: The SAE.
        field: Field of the SAE's metadata that names the hook.

    Raises:
        ValueError: If it names none, or one that the model lacks or that an SAE is
            attached to.
    """
    name = sae.cfg.metadata[field]
    own_name = own_hook_name(model, name)
    if own_name not in model.hook_dict:
        attached = list(getattr(model, "acts_to_saes", ()))
        raise ValueError(
            f"sae.cfg.metadata.{field} must be a hook of the model, got {name!r}"
            + (
                f"; model.reset_saes() detaches SAEs from {attached}"
                if attached
                else ""
            )
        )
    return own_name


def tokenizer_of(model: LanguageModel, purpose: str) -> Any:
    """
    Return the model's tokenizer.

    Raises:
        ValueError: If it has none; the message begins with the purpose.
    """
    if model.tokenizer is None:
        raise ValueError(f"{purpose} needs a model with a tokenizer, got none")
    return model.tokenizer


def token_strings(model: LanguageModel, ids: torch.Tensor | list[int]) -> list[str]:
    """Text of each of some token ids, ``[tokens]``, by itself."""
    each = [[int(i)] for i in ids]
    return model.tokenizer.batch_decode(each, clean_up_tokenization_spaces=False)


def as_input(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """
    Move token ids, ``[passages, tokens]``, to the device of the model's input embeddings.

    Raises:
        ValueError: If a passage is longer than the model's context, or a token none of
            its vocabulary.
    """
    n_ctx = model_size(model, "n_ctx", "max_position_embeddings")
    if n_ctx is not None and ids.shape[1] > n_ctx:
        raise ValueError(
            f"a passage, or a text with its BOS, must have at most {n_ctx} tokens, the "
            f"model's context, got {ids.shape[1]}"
        )
    d_vocab = model_size(model, "d_vocab", "vocab_size")
    if d_vocab is not None and ids.max() >= d_vocab:
        # Looked up on a GPU, it would end the process.
        raise ValueError(
            f"token ids must be less than {d_vocab}, the model's vocabulary, got "
            f"{int(ids.max())}"
        )
    device = input_device(model)
    # Embeddings that wait elsewhere until they are used: what brings them brings the ids, too.
    return ids if device.type == "meta" else ids.to(device)

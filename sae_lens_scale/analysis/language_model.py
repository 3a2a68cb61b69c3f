"""Access to a language model of any kind that SAELens knows: hooks, tokens, text, sizes."""

import re
from typing import Any, Protocol

import torch
from sae_lens import SAE
from torch import nn
from transformer_lens.hook_points import HookPoint

from sae_lens_scale.loading.errors import require_context, require_vocabulary
from sae_lens_scale.upstream import input_device, model_size, own_hook_name

# Hooks of HookedTransformer that are outside attention, MLP and norms, and Hugging Face's
# layers.
_OF_RESIDUAL_STREAM = re.compile(r"(blocks\.\d+\.)?hook_\w+|(\w+\.)*\d+")


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
            attached to; if the model is of none of the kinds.
    """
    if not hasattr(model, "hook_dict"):
        raise ValueError(
            "model must be a HookedTransformer, a SAETransformerBridge or a Hugging Face "
            f"model of sae_lens.load_model, got {type(model).__name__}"
        )
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


def text_ids(
    model: LanguageModel, sae: SAE[Any], text: str
) -> tuple[list[int], list[int]]:
    """
    Turn a text into tokens as an SAE was trained on them.

    Returns:
        Token ids that come before the text, the BOS or none, and its own, all of them.

    Raises:
        ValueError: If the text is none or has no tokens, or the model has no tokenizer.
    """
    if not isinstance(text, str):
        raise ValueError(f"text must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # A half of a surrogate pair, such as a byte of a command line that is no text.
        raise ValueError(f"text must be Unicode text, got {text!r}") from error
    tokenizer = tokenizer_of(model, "text")
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"text must have at least one token, got {text!r}")
    bos = tokenizer.bos_token_id if sae.cfg.metadata.prepend_bos else None
    return [] if bos is None else [bos], ids


def direct_logits(
    model: Any, hook: str, directions: torch.Tensor
) -> torch.Tensor | None:
    """
    Compute how directions of the residual stream change the model's logits by themselves:
    through the final norm and the unembedding, the layers between left out.

    Args:
        model: The language model.
        hook: Hook at which the directions are added.
        directions: Unit vectors, ``[n, d_model]``.

    Returns:
        Logits with a direction, less those without, ``[n, d_vocab]``; None if what is added
        at the hook does not go into the residual stream as it is. Hugging Face models do
        not say which is their final norm, and go without it.
    """
    d_model = model_size(model, "d_model")
    of_stream = _OF_RESIDUAL_STREAM.fullmatch(hook) and directions.shape[1] == d_model
    if not of_stream or d_model is None:
        return None
    if hasattr(model, "unembed"):
        norm, unembed = model.ln_final, model.unembed
    else:
        norm, unembed = nn.Identity(), model.model.get_output_embeddings()
    # As long as what a norm returns, so that its epsilon does not matter.
    x = directions.to(next(unembed.parameters())) * d_model**0.5
    x = torch.cat([x, torch.zeros_like(x[:1])]).unsqueeze(0)
    logits = unembed(norm(x))[0].float()
    return logits[:-1] - logits[-1]


def as_input(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """
    Move token ids, ``[passages, tokens]``, to the device of the model's input embeddings.

    Raises:
        ValueError: If a passage is longer than the model's context, or a token none of
            its vocabulary.
    """
    length = "the length of a passage, or of a text with its BOS,"
    require_context(length, ids.shape[1], model)
    require_vocabulary("tokens", ids, model)
    device = input_device(model)
    # Embeddings that wait elsewhere until they are used: what brings them brings the ids, too.
    return ids if device.type == "meta" else ids.to(device)

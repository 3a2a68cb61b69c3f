"""
Parts of SAELens and TransformerLens that they may rename, move or drop, and substitutes.

No other module of the package imports these (``docs/versions.md`` says why each of them may
go). Names are those of their libraries; where there is no HookedTransformer,
``HookedSAETransformer`` is SAELens's SAETransformerBridge.
"""

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import torch
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args as _parse_cfg_args
from sae_lens.saes.sae import _disable_hooks as _disable_hooks
from sae_lens.training._interruption import (
    InterruptedException as InterruptedException,
)
from sae_lens.training.activations_store import _get_input_token_device

# Imports under their own names are there for other modules.
try:
    from sae_lens import HookedSAETransformer as HookedSAETransformer
    from transformer_lens import HookedTransformerConfig as HookedTransformerConfig

    HAS_HOOKED_TRANSFORMER = True
except ImportError:
    from sae_lens.analysis.sae_transformer_bridge import (
        SAETransformerBridge as HookedSAETransformer,  # type: ignore[assignment]  # noqa: F401
    )

    HAS_HOOKED_TRANSFORMER = False

# Only SmolLM2 as a HookedTransformer needs it.
with suppress(ImportError):
    from transformer_lens.pretrained.weight_conversions.llama import (
        convert_llama_weights as convert_llama_weights,
    )

# TransformerLens's names of sizes, and Hugging Face's.
_HUGGING_FACE_SIZES = {
    "d_model": "hidden_size",
    "d_vocab": "vocab_size",
    "n_ctx": "max_position_embeddings",
}


def buffer_argument(
    contexts: int, callee: Callable[..., Any] = LanguageModelSAERunnerConfig
) -> dict[str, Any]:
    """
    Name the argument for the size of SAELens's buffer of activations, as installed.

    Args:
        contexts: The size, in contexts.
        callee: The config, or the store, that the argument is for.

    Returns:
        The one argument, to be unpacked in the call.

    Raises:
        TypeError: If ``callee`` has an argument of neither name.
    """
    names = ("n_sequences_in_buffer", "n_batches_in_buffer")
    parameters = inspect.signature(callee).parameters
    for name in names:
        if name in parameters:
            return {name: contexts}
    raise TypeError(f"{callee.__qualname__} must take {' or '.join(names)}")


def load_bridge(name: str, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """
    Load a language model as it is, nothing folded or centred, behind a bridge.

    Args:
        name: Name on the hub, or a folder.
        device: Device of the model.
        dtype: Type of its weights.

    Returns:
        A SAETransformerBridge, whose hooks have HookedTransformer's names besides its own.
    """
    # transformer-lens 2 has none.
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    bridge = SAETransformerBridge.boot_transformers(name, device=device, dtype=dtype)
    # For the names; without processing the weights stay as they are.
    bridge.enable_compatibility_mode(no_processing=True)
    return bridge


def own_hook_name(model: Any, name: str) -> str:
    """
    Find a language model's own name for a hook.

    Args:
        model: The model. A SAETransformerBridge knows HookedTransformer's names too, but
            caches and replaces activations under its own only.
        name: A name that it knows.

    Returns:
        Its own name; ``name`` where it has no other.
    """
    resolve = getattr(model, "_resolve_hook_name", None)
    return resolve(name) if resolve else name


def input_device(model: Any) -> torch.device:
    """
    Find the device of a language model's input embeddings.

    Args:
        model: The model, of any kind that SAELens knows.
    """
    return torch.device(_get_input_token_device(model))


def model_size(model: Any, name: Literal["d_model", "d_vocab", "n_ctx"]) -> int | None:
    """
    Find a size of a language model.

    Args:
        model: The model, of any kind that SAELens knows.
        name: The size's name in TransformerLens's config.

    Returns:
        The size; None where the model does not say it.
    """
    if hasattr(model, "cfg"):
        return getattr(model.cfg, name, None)
    config = getattr(getattr(model, "model", None), "config", None)
    return getattr(config, _HUGGING_FACE_SIZES[name], None)

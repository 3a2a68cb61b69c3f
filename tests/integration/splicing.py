"""Splicing SAEs into a HookedSAETransformer or a SAETransformerBridge, and doing without."""

from collections.abc import Callable
from typing import Any

import torch
from helpers import reconstruct
from integration.runs import new_sae
from sae_lens import HookedSAETransformer
from sae_lens.saes.sae import SAE, TrainingSAE

PROMPTS = [
    "I love apples but hate oranges completely.",
    "def forward(self, x): return self.linear(x)",
    "Hello",
]
# Experts, and latents of each.
N, SIZE = 4, 16


def resid_post(model: Any, layer: int = 0) -> str:
    """Hook name of the residual stream after a block; SAELens wants a bridge's own."""
    is_bridge = not isinstance(model, HookedSAETransformer)
    return f"blocks.{layer}.{'hook_out' if is_bridge else 'hook_resid_post'}"


def restore_hook_names(model: Any) -> None:
    """Undo a bridge's renaming of the hooks that SAEs were detached from."""
    for name, hook in model.hook_dict.items():
        hook.name = name


def clean_activations(
    model: Any, text: torch.Tensor | list[str], hook: str | None = None
) -> torch.Tensor:
    hook = hook or resid_post(model)
    return model.run_with_cache(text, names_filter=[hook])[1][hook].detach()


def suited_sae(
    architecture: str,
    model: Any,
    hook: str | None = None,
    name: str | None = None,
    **overrides: Any,
) -> TrainingSAE[Any]:
    """An SAE that suits the activations at a hook, under that or another name."""
    hook = hook or resid_post(model)
    sae: Any = new_sae(architecture, name or hook, **overrides)
    sae.initialize_from_activations(clean_activations(model, PROMPTS, hook).flatten(2))
    sae.b_enc.data.normal_(std=0.01)
    sae.W_dec.data.mul_(torch.rand(N * SIZE, 1) + 0.5)
    if architecture == "scale":
        sae.omega.data.normal_(std=0.5)
    return sae


def replaced_by(
    model: Any,
    tokens: torch.Tensor,
    edits: dict[str, Callable[[torch.Tensor], torch.Tensor]],
    **kwargs: Any,
) -> torch.Tensor:
    """Logits with activations replaced by plain hooks, no SAE attached."""
    restore_hook_names(model)
    hooks: list[Any] = [
        (name, lambda x, hook, edit=edit: reconstruct(edit, x))
        for name, edit in edits.items()
    ]
    return model.run_with_hooks(tokens, fwd_hooks=hooks, **kwargs)


def hooks_of_sae(cache: Any, hook: str) -> dict[str, torch.Tensor]:
    """Cached activations inside the SAE at a hook, by their names in the SAE."""
    start = f"{hook}."
    return {k.removeprefix(start): x for k, x in cache.items() if k.startswith(start)}


def shapes_inside(sae: SAE[Any], *batch: int) -> dict[str, tuple[int, ...]]:
    """Shape of each hook of an SAE on its inputs of shape ``[*batch, 32]``."""
    widths = {
        "hook_sae_input": 32,
        "hook_expert_weights": sae.cfg.experts_per_token,
        "hook_expert_indices": sae.cfg.experts_per_token,
        "hook_sae_acts_pre": N * SIZE,
        "hook_sae_acts_post": N * SIZE,
        "hook_sae_recons": 32,
        "hook_sae_output": 32,
    }
    return {name: (*batch, width) for name, width in widths.items()}


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def unselected_expert(sae: Any, x: torch.Tensor) -> int:
    """An expert that the last token of the first prompt does not select."""
    chosen = sae.route(x).indices[0, -1].tolist()
    return next(i for i in range(N) if i not in chosen)


def assert_differ(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() > 1e-3

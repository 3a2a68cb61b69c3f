"""Reading of a text by a language model, token by token."""

import torch
from datasets import Dataset, IterableDataset
from sae_lens import HookedSAETransformer
from sae_lens.training.activations_store import ActivationsStore


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

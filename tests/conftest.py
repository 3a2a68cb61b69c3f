"""Settings and fixtures of all tests."""

import copy
import os
from pathlib import Path

# Threads that spin while they wait starve each other on a machine with few cores. This has to be
# set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from helpers import small_corpus
from sae_lens import HookedSAETransformer
from transformer_lens import HookedTransformerConfig
from transformers import LlamaConfig, LlamaForCausalLM

from sae_lens_scale.loading.smollm2 import load_smollm2

# The files that take longest: one that began last would run alone. With several processes only
# --no-loadscope-reorder keeps to this order.
_FIRST = ("test_examples", "test_end_to_end", "test_benchmarks", "test_docs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files."""
    last = len(_FIRST)
    order = {name: i for i, name in enumerate(_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, last))


@pytest.fixture(scope="session")
def smollm2() -> HookedSAETransformer:
    """SmolLM2-135M-Instruct in float32."""
    return load_smollm2()


@pytest.fixture(scope="session")
def tiny_llama(
    smollm2: HookedSAETransformer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of a random two-layer Llama of width 32 with SmolLM2's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=smollm2.cfg.d_vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=smollm2.tokenizer.bos_token_id,  # type: ignore[union-attr]
        eos_token_id=smollm2.tokenizer.eos_token_id,  # type: ignore[union-attr]
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    smollm2.tokenizer.save_pretrained(folder)  # type: ignore[union-attr]
    return folder


@pytest.fixture(scope="session")
def tiny_model(smollm2: HookedSAETransformer) -> HookedSAETransformer:
    """
    A random two-layer transformer of width 32, 4 heads, with SmolLM2's tokenizer.

    For what depends on SAELens's machinery and not on a language model that knows
    anything: it runs in milliseconds.
    """
    cfg = HookedTransformerConfig(
        model_name="tiny",
        n_layers=2,
        d_model=32,
        n_heads=4,
        d_head=8,
        d_mlp=64,
        n_ctx=128,
        d_vocab=smollm2.cfg.d_vocab,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=8,
        seed=0,
        device="cpu",
    )
    model = HookedSAETransformer(cfg, copy.deepcopy(smollm2.tokenizer))
    return model.eval()


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of real text that ``datasets.load_dataset`` reads from disk."""
    folder = tmp_path_factory.mktemp("text")
    small_corpus().to_json(folder / "train.jsonl")
    return folder

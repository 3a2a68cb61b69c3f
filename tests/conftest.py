"""Settings and fixtures of all tests."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

# Threads that spin while they wait starve each other on a machine with few cores. This has to be
# set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from helpers import random_transformer, small_corpus
from integration.hub import Hub, running_hub
from sae_lens import HookedSAETransformer
from transformers import LlamaConfig, LlamaForCausalLM

from sae_lens_scale.loading.smollm2 import fetch_smollm2, load_smollm2

# The files that take longest come first: one that began last would run alone. With several
# processes, only --no-loadscope-reorder keeps this order.
_FIRST = (
    "test_examples",
    "test_notebooks",
    "test_hub_path",
    "test_end_to_end",
    "test_benchmarks",
    "test_docs",
)


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
    """A random two-layer transformer of width 32, 4 heads, with SmolLM2's tokenizer."""
    return random_transformer(smollm2.tokenizer, n_layers=2, n_heads=4, d_head=8)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a data set of real text that ``datasets.load_dataset`` reads."""
    folder = tmp_path_factory.mktemp("text")
    small_corpus().to_json(folder / "train.jsonl")
    return folder


@pytest.fixture(scope="module")
def delphi() -> Iterator[None]:
    """delphi without its requirements, kept beside the language model's files."""
    if find_spec("delphi") is not None:
        yield
        return
    folder = fetch_smollm2().with_name("eai-delphi-0.1.3")
    if not folder.exists():
        with TemporaryDirectory(prefix=".delphi-", dir=folder.parent) as temporary:
            whole = Path(temporary, folder.name)
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--target", whole, "eai-delphi==0.1.3"], check=True)
            whole.rename(folder)
    sys.path.append(str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """An empty hub that ``huggingface_hub`` uses during the test."""
    with running_hub(tmp_path / "client") as hub:
        yield hub

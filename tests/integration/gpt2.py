"""GPT-2 and OpenWebText as a hub has them, but random and small."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from helpers import small_corpus
from integration.hub import Hub
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel

MODEL = "gpt2"
DATASET = "Skylion007/openwebtext"
# More than what load_text holds out.
N_DOCUMENTS = 3_000
_END_OF_TEXT = "<|endoftext|>"


def publish(hub: Hub, folder: Path, **sizes: int) -> None:
    """
    Publish both under the names that they have on the Hugging Face hub.

    The model has, by default, GPT-2's width and as many layers as ``blocks.8`` needs; its
    tokenizer knows 500 tokens. The text is that of the small corpus, in a Parquet file.

    Args:
        hub: The hub.
        folder: Folder to write the files into before they are published.
        **sizes: Other sizes of the model, by the names of its config.
    """
    texts = [part for text in small_corpus()["text"] for part in text.split("\n\n")]
    texts = (texts * (N_DOCUMENTS // len(texts) + 1))[:N_DOCUMENTS]
    dataset = "plain_text/train-00000-of-00001.parquet"
    Dataset.from_dict({"text": texts}).to_parquet(folder / "text.parquet")
    configs = [
        {
            "config_name": "plain_text",
            "data_files": [{"split": "train", "path": "plain_text/train-*"}],
        }
    ]
    hub.repos[f"datasets/{DATASET}"] = {
        dataset: (folder / "text.parquet").read_bytes(),
        # JSON is YAML.
        "README.md": f"---\nconfigs: {json.dumps(configs)}\n---\n".encode(),
    }

    model = folder / "gpt2"
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts, vocab_size=500, special_tokens=[_END_OF_TEXT], show_progress=False
    )
    torch.manual_seed(0)
    end_of_text = tokenizer.token_to_id(_END_OF_TEXT)
    settings: dict[str, Any] = {
        "n_layer": 9,
        # TransformerLens reads it in the real config.json; transformers no longer writes it.
        "n_ctx": 1024,
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        **sizes,
    }
    GPT2LMHeadModel(GPT2Config(**settings)).half().save_pretrained(model)
    tokenizer.save(str(model / "tokenizer.json"))
    tokenizer.save_model(str(model))  # vocab.json and merges.txt
    (model / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    hub.put(MODEL, model)

"""GPT-2 that knows first letters, for tests that ask a model for them."""

import json
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import Any

import torch
from ecosystem.gpt2_saes import SIZES
from integration import gpt2
from integration.hub import Hub
from tokenizers import ByteLevelBPETokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GPT2Config, GPT2LMHeadModel

MARK = 26
MARKED = "abcdefg"
_END_OF_TEXT = "<|endoftext|>"
# A space, as byte-level tokenizers write it.
_SPACE = "Ġ"
_TEMPLATE = ("has", "the", "first", "letter")


def publish(hub: Hub, folder: Path) -> None:
    """
    Publish a small GPT-2 under the name that it has on the Hugging Face hub.

    Its tokens are bytes, all words of two small letters, capital letters after a space, and
    the words of SAEBench's prompt, "aa has the first letter: A". The embedding of a word has
    one dimension for its first letter (``ascii_lowercase.index(letter)``), and one
    (``MARK``) says that its second letter is one of ``MARKED``; all else is random and small.

    Args:
        hub: The hub.
        folder: Folder to write the files into before they are published.
    """
    vocab, merges = _vocabulary()
    tokenizer = ByteLevelBPETokenizer(vocab, merges)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.save_model(str(folder))  # vocab.json and merges.txt
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 1024})
    )
    end_of_text = vocab[_END_OF_TEXT]
    settings: dict[str, Any] = {
        "n_ctx": 1024,
        "vocab_size": len(vocab),
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        **SIZES,
    }
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**settings))
    with torch.no_grad():
        embeddings = model.transformer.wte.weight
        for token, index in vocab.items():
            word = token.removeprefix(_SPACE).lower()
            if word[:1] in ascii_lowercase:
                embeddings[index, ascii_lowercase.index(word[:1])] += 1
            if len(word) == 2 and word[1] in MARKED:
                embeddings[index, MARK] += 1
    model.save_pretrained(folder)
    hub.put(gpt2.MODEL, folder)


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The tokens with their numbers, and the merges that make them, most urgent first."""
    merges = [
        (_SPACE + word[:length], word[length])
        for word in _TEMPLATE
        for length in range(len(word))
    ]
    merges += [(_SPACE, letter) for letter in ascii_uppercase]
    merges += [(one, other) for one in ascii_lowercase for other in ascii_lowercase]
    merges = list(dict.fromkeys(merges))
    tokens = [*sorted(ByteLevel.alphabet()), *map("".join, merges), _END_OF_TEXT]
    return {token: number for number, token in enumerate(tokens)}, merges

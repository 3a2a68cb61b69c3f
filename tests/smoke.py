"""
Smoke test of an installed package: ``python -I tests/smoke.py``, with no other file of a checkout.

It needs neither a model hub nor packages of extras: the language model is made here.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import datasets
import torch
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import sae_lens_scale
from sae_lens_scale.cli import main

WORDS = ["<s>", "?", *"abcdefghijklmnopqrstuvwxyz"]


def make_model(folder: Path) -> None:
    """Save a random language model of one layer, whose tokens are letters."""
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", unk_token="?"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def run(command: str) -> str:
    """Run a command of ``sae-lens-scale`` and return what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            status = main(command.split())
        except SystemExit as stop:
            status = stop.code
    assert status == 0, f"{command} ended with status {status}"
    return printed.getvalue()


def smoke(folder: Path) -> None:
    """Train, load and evaluate a small SAE of each architecture in a folder."""
    assert run("--version") == f"sae-lens-scale {sae_lens_scale.__version__}\n"
    make_model(folder / "model")
    letters = torch.randint(97, 123, (64, 200)).tolist()
    texts = {"text": [bytes(row).decode() for row in letters]}
    datasets.Dataset.from_dict(texts).to_json(folder / "text" / "train.jsonl")
    for architecture in ("scale", "switch"):
        assert architecture in SAE_CLASS_REGISTRY
        assert architecture in SAE_TRAINING_CLASS_REGISTRY
        output = folder / architecture
        run(
            f"train --architecture {architecture} --d_in 16 --d_sae 64 --num_experts 4 "
            f"--k 4 --model_class_name AutoModelForCausalLM --model_name {folder}/model "
            f"--hook_name model.layers.0 --dataset_path {folder}/text "
            "--is_dataset_tokenized false --context_size 16 --training_tokens 2048 "
            "--train_batch_size_tokens 256 --n_batches_in_buffer 32 "
            "--store_batch_size_prompts 8 --log_to_wandb false --n_checkpoints 0 "
            f"--output_path {output} --device cpu"
        )
        sae = SAE.load_from_disk(output)
        assert sae.cfg.architecture() == architecture
        assert torch.isfinite(sae(torch.randn(8, 16))).all()
        table = run(
            f"evaluate {output} --device cpu --batch_size_prompts 2 "
            "--n_eval_reconstruction_batches 1 --n_eval_sparsity_variance_batches 1"
        )
        assert "sparsity.l0" in table


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        smoke(Path(temporary))
    sys.stdout.write(f"sae-lens-scale {sae_lens_scale.__version__} works\n")

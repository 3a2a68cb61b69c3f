"""``sae-lens-scale cache`` on a language model in a folder, and training from its cache."""

from pathlib import Path

import torch
from cli.runs import Run, train_command
from sae_lens.saes.sae import SAE


def test_train_trains_on_what_cache_has_kept(
    tiny_llama: Path, text_folder: Path, tmp_path: Path, run: Run
):
    folder = tmp_path / "activations"
    command = train_command("scale", tiny_llama, text_folder, tmp_path, 2_048)
    command += f" --cached_activations_path {folder}"
    err = run(command.replace("train", "cache", 1)).err
    assert f"caching 2,048 tokens of model.layers.0 of {tiny_llama} in {folder}" in err
    assert "tokens are cached; next: sae-lens-scale train" in err
    # The model is not read again.
    text_folder = tiny_llama = tmp_path
    run(f"{command} --use_cached_activations true --lr 1e-3")
    sae = SAE.load_from_disk(tmp_path / "sae")
    assert sae(torch.randn(3, 32)).isfinite().all()
    message = f"context_size must be 32, as of the activations in {folder}, got 16"
    assert message in run(f"{command} --use_cached true --context_size 16", 1).err


def test_what_cannot_be_cached_is_refused_in_one_line(
    tiny_llama: Path, text_folder: Path, tmp_path: Path, run: Run
):
    command = train_command("scale", tiny_llama, text_folder, tmp_path, 2_048)
    command = command.replace("train", "cache", 1)
    assert "cached_activations_path must name a folder, got None" in run(command, 1).err
    help = " ".join(run("cache --help").out.split())
    assert "--cached_activations_path" in help

"""The training command under torchrun: real processes, model, text and files."""

import json
from pathlib import Path

import pytest
import torch
from cli.runs import train_command
from distributed.launch import checkpoints, finish, torchrun
from sae_lens import SAE
from safetensors.torch import load_file

from sae_lens_scale.cli import main


@pytest.mark.parametrize(("processes", "experts"), [(2, 1), (3, 3)])
def test_the_command_trains_on_several_processes_what_it_trains_on_one(
    processes: int,
    experts: int,
    tiny_llama: Path,
    text_folder: Path,
    trained_on_one: Path,
    tmp_path: Path,
):
    command = train_command("scale", tiny_llama, text_folder, tmp_path)
    command += f" --expert_parallel {experts}"
    _, err = finish(torchrun(processes, command))
    # One process shows progress, and says how to go on.
    assert err.count("Training SAE: 100%") <= 1
    assert err.count("next: sae-lens-scale evaluate") == 1
    folder = tmp_path / "sae"
    one = trained_on_one / "sae"
    assert {f.name for f in folder.iterdir()} == {f.name for f in one.iterdir()}
    tensors, of_one = (load_file(f / "sae_weights.safetensors") for f in (folder, one))
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in of_one.items()
    }
    cfg, cfg_of_one = (json.loads((f / "cfg.json").read_text()) for f in (folder, one))
    assert cfg.keys() == cfg_of_one.keys()
    assert cfg["device"] == cfg_of_one["device"]
    assert 4 < cfg["metadata"]["l0"] <= 8
    # One folder of checkpoints, whose middle one is an ordinary one.
    (middle,) = checkpoints(tmp_path)
    ordinary = SAE.load_from_disk(folder)
    assert ordinary(torch.randn(3, 32)).isfinite().all()
    resumed = tmp_path / "resumed"
    again = train_command("scale", tiny_llama, text_folder, resumed)
    assert main([*again.split(), "--resume_from_checkpoint", str(middle)]) == 0
    assert (resumed / "sae" / "cfg.json").exists()

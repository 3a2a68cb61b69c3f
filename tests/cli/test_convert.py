"""``sae-lens-scale convert``."""

import json
from pathlib import Path

import torch
from cli.runs import Run

from sae_lens_scale.loading.formats import FORMATS


def test_convert_writes_a_folder_that_SAELens_loads(tmp_path: Path, run: Run):
    shapes = {
        "encoder.weight": (40, 10),
        "decoder": (40, 10),
        "router.weight": (4, 10),
        "b_dec": (10,),
        "b_router": (10,),
    }
    torch.manual_seed(0)
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "ae.pt")
    target = tmp_path / "converted"
    command = f"convert {tmp_path / 'ae.pt'} {target}"
    assert "k is needed" in run(command, 1).err
    assert not target.exists()
    command += " --k 3 --no-heaviside --model_name gpt2"
    command += " --hook_name blocks.8.hook_resid_post"
    captured = run(command)
    assert captured.out == f"{target}\n"
    assert captured.err == f"sae-lens-scale: next: sae-lens-scale info {target}\n"
    facts = json.loads(run(f"info {target} --json").out)
    assert (facts["architecture"], facts["k"]) == ("switch", 3)
    assert facts["gate"] == "softmax"
    assert facts["model_name"] == "gpt2"
    assert facts["hook_name"] == "blocks.8.hook_resid_post"
    assert "target must not exist" in run(command, 1).err
    inside = command.replace(str(target), str(tmp_path / "ae.pt" / "converted"))
    assert f"target: {tmp_path / 'ae.pt'} is no folder" in run(inside, 1).err


def test_convert_help_names_every_format(run: Run):
    # Lines also end after hyphens.
    out = " ".join(run("convert --help").out.split()).replace("- ", "-")
    for form in FORMATS:
        assert form.name in out

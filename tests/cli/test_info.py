"""``sae-lens-scale info`` on trained SAEs, and on files that are none."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.runs import Run, checkpoint_of
from sae_lens.saes.sae import SAE


def test_info_describes_an_SAE(trained: Path, run: Run):
    facts = json.loads(run(f"info {trained / 'sae'} --json").out)
    sae = SAE.load_from_disk(trained / "sae")
    assert facts["architecture"] == sae.cfg.architecture()
    assert (facts["num_experts"], facts["k"], facts["latents_per_expert"]) == (4, 8, 32)
    assert facts["hook_name"] == "model.layers.0"
    assert facts["parameters"] == sum(p.numel() for p in sae.parameters())
    if facts["architecture"] == "scale":
        omega = torch.tensor(sae.cfg.metadata.omega)
        assert facts["omega"]["max"] == pytest.approx(omega.max().item())
        assert facts["experts_per_token"] == 2
    else:
        assert "omega" not in facts
        assert facts["experts_per_token"] == 1
    rows = run(f"info {trained / 'sae'}").out.splitlines()
    assert ["num_experts", "4"] in [row.split() for row in rows]


def test_info_describes_a_checkpoint_as_it_was_saved(trained: Path, run: Run):
    facts = json.loads(run(f"info {checkpoint_of(trained)} --json").out)
    assert facts["normalize_activations"] == "expected_average_only_in"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "TypeError"),
        ("{", "Expecting property name"),
        ('{"architecture": "nonsense", "dtype": "float32"}', "KeyError: 'nonsense'"),
        (
            '{"architecture": "scale", "dtype": "float32", "metadata": 3}',
            "AttributeError",
        ),
    ],
)
def test_an_SAE_that_cannot_be_loaded_is_named(
    content: str, message: str, untrained: Path, run: Run
):
    (untrained / "cfg.json").write_text(content)
    captured = run(f"info {untrained}", 1)
    error = f"sae-lens-scale: error: {untrained} cannot be loaded: "
    assert captured.err.startswith(error)
    assert message in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("command", "metadata", "message"),
    [
        ("info", {"omega": "abc"}, "TypeError: "),
        ("evaluate", {"hook_name": None}, "metadata name no hook"),
        (
            "evaluate",
            {"context_size": "32"},
            "must be of type int in the SAE's metadata",
        ),
        ("info", {"omega": []}, None),
    ],
)
def test_odd_metadata_are_errors_in_one_line(
    command: str,
    metadata: dict[str, Any],
    message: str | None,
    trained: Path,
    tmp_path: Path,
    run: Run,
):
    sae = shutil.copytree(trained / "sae", tmp_path / "sae")
    cfg = json.loads((sae / "cfg.json").read_text())
    cfg["metadata"].update(metadata)
    (sae / "cfg.json").write_text(json.dumps(cfg))
    captured = run(f"{command} {sae}", 0 if message is None else 1)
    if message is not None:
        assert captured.out == ""
        last_line = captured.err.splitlines()[-1]
        assert last_line.startswith("sae-lens-scale: error: ")
        assert message in last_line
        assert "Traceback" not in captured.err

"""``sae-lens-scale info`` on trained SAEs, and on files that are none."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.runs import checkpoint_of
from sae_lens.saes.sae import SAE

from sae_lens_scale import ScaleTrainingSAE, ScaleTrainingSAEConfig
from sae_lens_scale.cli import main


def test_info_describes_an_SAE(trained: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["info", str(trained / "sae"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
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
    assert main(["info", str(trained / "sae")]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert ["num_experts", "4"] in [row.split() for row in rows]


def test_info_describes_a_checkpoint_as_it_was_saved(
    trained: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["info", str(checkpoint_of(trained)), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
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
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cfg = ScaleTrainingSAEConfig(d_in=32, d_sae=128, num_experts=4)
    ScaleTrainingSAE(cfg).save_inference_model(tmp_path)
    (tmp_path / "cfg.json").write_text(content)
    assert main(["info", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    error = f"sae-lens-scale: error: {tmp_path} cannot be loaded: "
    assert captured.err.startswith(error)
    assert message in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)


def with_metadata(sae: Path, target: Path, **metadata: Any) -> Path:
    shutil.copytree(sae, target)
    cfg = json.loads((sae / "cfg.json").read_text())
    cfg["metadata"].update(metadata)
    (target / "cfg.json").write_text(json.dumps(cfg))
    return target


def test_odd_metadata_are_errors_in_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name, command, metadata, message in (
        ("omega", "info", {"omega": "abc"}, "TypeError: "),
        ("hook", "evaluate", {"hook_name": None}, "metadata name no hook"),
        ("length", "evaluate", {"context_size": "32"}, "TypeError: "),
    ):
        sae = with_metadata(trained / "sae", tmp_path / name, **metadata)
        assert main([command, str(sae)]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        last_line = captured.err.splitlines()[-1]
        assert last_line.startswith("sae-lens-scale: error: ")
        assert message in last_line
        assert "Traceback" not in captured.err
    empty = with_metadata(trained / "sae", tmp_path / "empty", omega=[])
    assert main(["info", str(empty)]) == 0

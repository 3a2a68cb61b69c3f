"""``sae-lens-scale convert``."""

import json
from pathlib import Path

import pytest
import torch

from sae_lens_scale.cli import main
from sae_lens_scale.loading.formats import FORMATS


def test_convert_writes_a_folder_that_SAELens_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    torch.manual_seed(0)
    torch.save(
        {
            "encoder.weight": torch.randn(40, 10),
            "decoder": torch.randn(40, 10),
            "router.weight": torch.randn(4, 10),
            "b_dec": torch.randn(10),
            "b_router": torch.randn(10),
        },
        tmp_path / "ae.pt",
    )
    target = tmp_path / "converted"
    command = f"convert {tmp_path / 'ae.pt'} {target}".split()
    assert main(command) == 1
    assert "k is needed" in capsys.readouterr().err
    assert not target.exists()
    options = (
        "--k 3 --no-heaviside --model_name gpt2 --hook_name blocks.8.hook_resid_post"
    )
    assert main([*command, *options.split()]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert main(["info", str(target), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["architecture"], facts["k"], facts["gate"]) == (
        "switch",
        3,
        "softmax",
    )
    assert facts["hook_name"] == "blocks.8.hook_resid_post"
    assert main([*command, *options.split()]) == 1
    assert "target must not exist" in capsys.readouterr().err


def test_convert_help_names_every_format(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["convert", "--help"])
    assert stop.value.code == 0
    # Lines also end after hyphens.
    out = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    for form in FORMATS:
        assert form.name in out


def test_convert_calls_any_other_file_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = tmp_path / "ae.pt"
    for content in (b"hi", b"", b"PK\x03\x04", b"\x80\x02]q"):
        source.write_bytes(content)
        assert main(["convert", str(source), str(tmp_path / "target")]) == 1
        assert f"{source} is damaged" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ae.pt"]

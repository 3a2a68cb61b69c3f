"""Fixtures of the tests of the command line."""

from pathlib import Path

import pytest
from cli.runs import train_command

from sae_lens_scale import ScaleTrainingSAE, ScaleTrainingSAEConfig
from sae_lens_scale.cli import main


@pytest.fixture(scope="session", params=["scale", "switch"])
def trained(
    request: pytest.FixtureRequest,
    tiny_llama: Path,
    text_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Folder of the results of ``train``: ``sae`` and ``checkpoints``."""
    output = tmp_path_factory.mktemp(request.param)
    command = train_command(request.param, tiny_llama, text_folder, output)
    assert main(command.split()) == 0
    return output


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    """Folder of an SAE whose metadata say nothing."""
    cfg = ScaleTrainingSAEConfig(
        d_in=32, d_sae=128, num_experts=4, normalize_activations="none"
    )
    ScaleTrainingSAE(cfg).save_inference_model(tmp_path / "untrained")
    return tmp_path / "untrained"

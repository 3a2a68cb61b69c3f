"""Fixtures of the tests of the command line."""

from pathlib import Path

import pytest
from cli.runs import train_command

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
    assert main(train_command(request.param, tiny_llama, text_folder, output)) == 0
    return output

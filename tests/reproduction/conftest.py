"""Records that several test modules share."""

from pathlib import Path

import pytest
from experiment_records import write_records

from reproduction.presets import PRESETS


@pytest.fixture(scope="session")
def records_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of every preset of smollm2, for reading only."""
    folder = tmp_path_factory.mktemp("records")
    for preset in PRESETS:
        if preset.startswith("smollm2"):
            write_records(folder, preset)
    return folder

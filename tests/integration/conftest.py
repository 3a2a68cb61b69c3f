"""Fixtures of the integration tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.hub import Hub, running_hub
from integration.runs import ARCHITECTURES, TrainingRun, train_tiny_sae
from sae_lens import HookedSAETransformer


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """An empty hub that ``huggingface_hub`` uses during the test."""
    with running_hub(tmp_path / "client") as hub:
        yield hub


@pytest.fixture(scope="session", params=ARCHITECTURES)
def training_run(
    request: pytest.FixtureRequest,
    tiny_model: HookedSAETransformer,
    tmp_path_factory: pytest.TempPathFactory,
) -> TrainingRun:
    """A finished run of one architecture and its files."""
    folder = tmp_path_factory.mktemp(request.param)
    return train_tiny_sae(request.param, tiny_model, folder)

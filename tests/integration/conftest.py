"""Fixtures of the integration tests."""

import pytest
from integration.runs import ARCHITECTURES, TrainingRun, train_tiny_sae
from sae_lens import HookedSAETransformer


@pytest.fixture(scope="session", params=ARCHITECTURES)
def training_run(
    request: pytest.FixtureRequest,
    tiny_model: HookedSAETransformer,
    tmp_path_factory: pytest.TempPathFactory,
) -> TrainingRun:
    """A finished run of one architecture and its files."""
    folder = tmp_path_factory.mktemp(request.param)
    return train_tiny_sae(request.param, tiny_model, folder)

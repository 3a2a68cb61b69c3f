"""Tests with tools of others: `make test-ecosystem` installs them."""

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from ecosystem import spelling_gpt2
from ecosystem.gpt2_saes import SIZES
from integration import gpt2
from integration.hub import Hub, running_hub

# Tests of a file, and the package without which there is nothing to test.
_NEEDS = {
    "page": "nnsight",
    "nnsight": "nnsight",
    "sae_dashboard": "sae_dashboard",
    "sae_bench": "sae_bench",
    "probing": "sae_probes",
    "score": "sae_probes",
}
collect_ignore = [
    f"test_{name}.py" for name, package in _NEEDS.items() if find_spec(package) is None
]


@pytest.fixture(scope="module")
def hub_with_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with a small random GPT-2."""
    with running_hub(tmp_path_factory.mktemp("client")) as hub:
        gpt2.publish(hub, tmp_path_factory.mktemp("published"), **SIZES)
        yield hub


@pytest.fixture(scope="module")
def hub_with_spelling_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with a small GPT-2 that knows the first letters of its tokens."""
    with running_hub(tmp_path_factory.mktemp("client")) as hub:
        spelling_gpt2.publish(hub, tmp_path_factory.mktemp("published"))
        yield hub


@pytest.fixture
def absorption_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder for the probes and tables that SAEBench keeps beside its own code."""
    folder = tmp_path / "absorption"
    if find_spec("sae_bench") is not None:
        absorption = import_module("sae_bench.evals.absorption.main")
        folders = {"probes_dir": folder / "probes"}
        for name, own in {
            "run_k_sparse_probing_experiment": {"experiment_dir": folder / "sparse"},
            "run_feature_absortion_experiment": {
                "experiment_dir": folder / "absorption",
                "sparse_probing_experiment_dir": folder / "sparse",
            },
        }.items():
            run = partial(getattr(absorption, name), **folders, **own)
            monkeypatch.setattr(absorption, name, run)
    return folder

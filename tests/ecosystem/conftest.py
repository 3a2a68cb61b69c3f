"""Tests with tools of others: `make test-ecosystem` installs them."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
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

"""Settings and fixtures of all tests."""

import os

# Threads that spin while they wait starve each other on a machine with few cores. This has to be
# set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from sae_lens import HookedSAETransformer

from sae_lens_scale.loading.smollm2 import load_smollm2


@pytest.fixture(scope="session")
def smollm2() -> HookedSAETransformer:
    """SmolLM2-135M-Instruct in float32."""
    return load_smollm2()

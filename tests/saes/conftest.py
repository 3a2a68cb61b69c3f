"""Fixtures of the tests of SAEs: functions that make small ones."""

from typing import Any

import pytest
from helpers import inference, scale_sae, switch_sae


@pytest.fixture(params=[scale_sae, switch_sae], ids=["scale", "switch"])
def make(request: pytest.FixtureRequest) -> Any:
    """Makes training SAEs of each architecture: 5 experts of 12 latents, k 6."""
    return request.param


@pytest.fixture(params=["train", "infer"])
def make_either(request: pytest.FixtureRequest, make: Any) -> Any:
    """Makes SAEs of each architecture and for each use."""
    if request.param == "train":
        return make
    return lambda **overrides: inference(make(**overrides))


@pytest.fixture(params=[True, False], ids=["sparse", "dense"])
def sparse(request: pytest.FixtureRequest) -> bool:
    """Value of ``use_sparse_activations``."""
    return request.param

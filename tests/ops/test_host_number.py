"""Numbers on their way to the host."""

import copy
import pickle

import pytest
import torch

from sae_lens_scale.ops import HostNumber

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available(), reason="there is no GPU"
        ),
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_a_number_is_read_as_it_was_when_it_set_off(device: str):
    tensor = torch.tensor(3, device=device)
    number = HostNumber(tensor)
    tensor += 1
    assert number.read() == 3
    assert number.has_arrived()
    assert HostNumber(torch.tensor(False, device=device)).read() is False
    for same in (copy.deepcopy(number), pickle.loads(pickle.dumps(number))):
        assert same.read() == 3

"""SAEs named on the command line."""

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from sae_lens import SAE

from sae_lens_scale.cli.sae_argument import load_sae


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        ImportError("this needs the package x"),
    ],
)
def test_what_is_not_about_the_files_passes_unchanged(
    error: Exception, untrained: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(SAE, "load_from_disk", Mock(side_effect=error))
    with pytest.raises(type(error)) as raised:
        load_sae(str(untrained), None, "cpu", None)
    assert raised.value is error


def test_a_device_that_cannot_be_used_is_not_blamed_on_the_files(untrained: Path):
    for device in ("meta", "nonsense", ""):
        with pytest.raises(ValueError, match=f"^--device '{device}' cannot be used: "):
            load_sae(str(untrained), None, device, None)

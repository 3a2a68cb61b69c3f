"""Importing the package makes SAELens know the architectures, once."""

import importlib
import subprocess
import sys

import pytest
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

import sae_lens_scale


@pytest.mark.parametrize("architecture", ["scale", "switch"])
def test_import_registers_the_architecture_in_both_registries(architecture: str):
    for registry, kind in (
        (SAE_CLASS_REGISTRY, "SAE"),
        (SAE_TRAINING_CLASS_REGISTRY, "TrainingSAE"),
    ):
        name = architecture.capitalize() + kind
        assert registry[architecture] == (
            getattr(sae_lens_scale, name),
            getattr(sae_lens_scale, f"{name}Config"),
        )


def test_reloading_registers_again_without_error():
    importlib.reload(sae_lens_scale)
    assert SAE_CLASS_REGISTRY["scale"][0] is sae_lens_scale.ScaleSAE


def test_a_second_import_replaces_the_classes_of_the_first():
    # Autoreload does this, and test runners that clear sys.modules.
    code = """
import sys, sae_lens_scale
first = sae_lens_scale.ScaleSAE
for name in [m for m in sys.modules if m.split('.')[0] == 'sae_lens_scale']:
    del sys.modules[name]
import sae_lens_scale
from sae_lens.registry import SAE_CLASS_REGISTRY
assert sae_lens_scale.ScaleSAE is not first
assert SAE_CLASS_REGISTRY['scale'][0] is sae_lens_scale.ScaleSAE
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_architecture_of_somebody_else_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch,
):
    class Other:
        __module__ = "somebody.else"

    monkeypatch.setitem(SAE_CLASS_REGISTRY, "scale", (Other, Other))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale already registered"):
        sae_lens_scale._register()


def test_import_needs_none_of_the_extras():
    code = """
import sys
for name in ('matplotlib', 'gguf', 'accelerate'):
    sys.modules[name] = None
import sae_lens_scale
"""
    subprocess.run([sys.executable, "-c", code], check=True)

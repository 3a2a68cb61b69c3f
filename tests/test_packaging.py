"""The wheel that pyproject.toml builds holds the package alone and works on its own."""

import os
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sae_lens_scale"


def test_the_wheel_imports_registers_is_typed_and_holds_the_package_alone(
    tmp_path: Path,
):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation"]
        + ["--wheel-dir", str(tmp_path)],
        check=True,
    )
    (wheel,) = tmp_path.glob("sae_lens_scale-0.1.0-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "sae_lens_scale/py.typed" in names
    # No laboratory, tests, examples or benchmarks.
    folders = {name.partition("/")[0] for name in names}
    assert folders == {"sae_lens_scale", "sae_lens_scale-0.1.0.dist-info"}
    modules = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    site = tmp_path / "site"
    subprocess.run(
        [*pip, "install", str(wheel), "--no-deps", "--target", str(site)], check=True
    )
    code = f"""
import sae_lens_scale
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
assert sae_lens_scale.__file__.startswith({str(site)!r}), sae_lens_scale.__file__
for registry in (SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY):
    assert {{"scale", "switch"}} <= set(registry)
"""
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
    )


def test_the_environment_of_make_reproduce_has_every_requirement():
    lines = (ROOT / "constraints" / "reproduction.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    # pip installs these and no others.
    installed = {canonicalize_name(name): version for name, version in pins}
    needed = map(Requirement, requires("sae-lens-scale") or [])
    checked = 0
    for requirement in needed:
        if requirement.marker and not requirement.marker.evaluate({"extra": "demo"}):
            continue
        version = installed[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement
        checked += 1
    assert checked > 10

"""Builds of pyproject.toml: a wheel of the package alone, a source archive; the citation."""

import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import requires
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from sae_lens_scale import __version__

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
    (wheel,) = tmp_path.glob(f"sae_lens_scale-{__version__}-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "sae_lens_scale/py.typed" in names
    # No laboratory, tests, examples or benchmarks.
    folders = {name.partition("/")[0] for name in names}
    assert folders == {"sae_lens_scale", f"sae_lens_scale-{__version__}.dist-info"}
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


def test_the_source_archive_holds_all_that_a_checkout_needs(tmp_path: Path):
    command = [sys.executable, "-m", "hatchling", "build", "--target", "sdist"]
    subprocess.run([*command, "--directory", str(tmp_path)], check=True, cwd=ROOT)
    root = f"sae_lens_scale-{__version__}"
    with tarfile.open(tmp_path / f"{root}.tar.gz") as archive:
        names = {name.removeprefix(f"{root}/") for name in archive.getnames()}
        metadata = archive.extractfile(f"{root}/PKG-INFO")
        assert metadata is not None
        assert f"\nVersion: {__version__}\n" in metadata.read().decode()
    assert {
        *("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"),
        *("Makefile", "constraints.txt", "pyproject.toml", "tests/smoke.py"),
        *("sae_lens_scale/__init__.py", "reproduction/__main__.py", "docs/code.md"),
    } <= names
    assert not [name for name in names if name.startswith(("outputs", ".venv"))]


def test_the_changelog_has_the_version():
    is_released = not Version(__version__).is_devrelease
    heading = f"[{__version__}] - 20" if is_released else "[Unreleased]\n"
    assert f"\n## {heading}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_citation_has_what_its_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    papers = citation["references"]
    for entry in (citation, *papers):
        assert entry["title"] and entry["type"]
        assert all(author["name"] for author in entry["authors"])
    assert citation["message"]
    # Of the names that the README has for the papers.
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert papers[0]["title"] in readme
    assert papers[1]["url"] in readme


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

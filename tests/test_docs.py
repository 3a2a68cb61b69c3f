"""The code of docs/ runs, its tables state what is so, and links lead somewhere."""

import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import draw, scale_sae
from integration.hub import running_hub
from pages import run_python, snippets
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAEConfig
from torch.torch_version import TorchVersion

from sae_lens_scale import ScaleTrainingSAEConfig, SwitchTrainingSAEConfig
from sae_lens_scale.analysis import autointerp
from sae_lens_scale.cli import main
from sae_lens_scale.ops import torch_backend
from sae_lens_scale.saes.mixture.routing import GATES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.mark.usefixtures("delphi")
def test_every_snippet_and_command_of_the_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    reply = "[EXPLANATION]: names, [1, 0, 1, 0, 0]"
    monkeypatch.setattr(autointerp, "openai_judge", lambda name: lambda chat: reply)
    pages = [DOCS / f"{n}.md" for n in ("train", "load-and-splice", "analysis")]
    namespace: dict[str, Any] = {}
    with running_hub(tmp_path / "hub-cache"):
        for page in pages:
            run_python(page, namespace)
    assert namespace["result"].latents
    commands = "".join(text for page in pages for _, text in snippets(page, "bash"))
    ran = set()
    for command in commands.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(command, comments=True)
        if program == "sae-lens-scale":
            assert main(arguments) == 0, command
            ran.add(arguments[0])
    assert ran == {"train", "info", "convert", "evaluate"}


@pytest.mark.parametrize("name", ["gate", "selection", "architecture", "kernel"])
def test_code_that_extends_the_package_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    # What the pages add or replace is theirs alone.
    monkeypatch.setattr(torch_backend, "sparse_decode", torch_backend.sparse_decode)
    with (
        mock.patch.dict(GATES),
        mock.patch.dict(SAE_CLASS_REGISTRY),
        mock.patch.dict(SAE_TRAINING_CLASS_REGISTRY),
    ):
        run_python(DOCS / "extend" / f"{name}.md", {})


@pytest.mark.skipif(
    torch.__version__ < TorchVersion("2.13"), reason="the limits speak of 2.13"
)
def test_derivatives_are_as_the_limits_say():
    sae = scale_sae()
    x = draw(3, 10)
    of_each = torch.vmap(torch.func.jacrev(sae))(x)
    want = torch.stack([torch.func.jacfwd(sae)(row) for row in x])
    torch.testing.assert_close(of_each, want, atol=1e-9, rtol=1e-9)
    x.requires_grad_()
    out = sae(x)
    with pytest.raises(RuntimeError, match="Sparse CSR"):
        torch.autograd.grad(
            out, x, torch.ones(2, *out.shape).to(x), is_grads_batched=True
        )


def test_table_of_config_fields_states_the_defaults():
    page = (DOCS / "config.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", page, re.MULTILINE))
    scale = ScaleTrainingSAEConfig(d_in=512, d_sae=1024)
    switch = SwitchTrainingSAEConfig(d_in=512, d_sae=1024)
    assert set(rows) == names(ScaleTrainingSAEConfig) - names(TrainingSAEConfig)
    for name, text in rows.items():
        stated = re.findall(r"[\w.]+", text)
        assert stated[0] == str(getattr(scale, name)), name
        if "switch: `" in text:
            assert stated[-1] == str(getattr(switch, name)), name


def names(config_class: Any) -> set[str]:
    return {field.name for field in fields(config_class)}


PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "reproduction/*.md")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings_of_the_repository(name: str):
    page = ROOT / name
    links = re.findall(r"\]\(([^()\s]+)\)", without_code(page))
    for link in links:
        target, _, anchor = link.partition("#")
        if ":" in target:
            continue
        path = page.parent / target if target else page
        assert path.exists(), link
        if anchor:
            assert anchor in anchors(path), link


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub, and the site, give a page's headings."""
    headings = re.findall(r"^#+ (.*)", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}

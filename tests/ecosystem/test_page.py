"""The code of docs/ecosystem.md runs, as far as its tools are installed."""

import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from ecosystem.gpt2_saes import export
from pages import run_python, snippets

from sae_lens_scale.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "ecosystem.md"


@pytest.mark.usefixtures("hub_with_gpt2")
def test_the_code_of_the_page_runs(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    export("scale", Path("scale"))
    Path("corpus").symlink_to(text_folder)
    namespace: dict[str, Any] = {}
    run_python(PAGE, namespace)
    clean = namespace["model"](namespace["tokens"]).logits
    for changed in {"logits", "steered"} & namespace.keys():
        assert not clean.equal(namespace[changed])
    for _, text in snippets(PAGE, "bash"):
        arguments = shlex.split(text.replace("\\\n", " "))
        if find_spec(arguments[3].partition(".")[0]) is not None:
            assert main(arguments[1:]) == 0
            assert list(Path("neuronpedia").glob("*/batch-0.json"))

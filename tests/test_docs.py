"""The snippets of docs/saelens.md run, from its top to its bottom."""

import os
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from integration.hub import running_hub

from sae_lens_scale.cli import main
from sae_lens_scale.loading.smollm2 import smollm2_folder

HAS_BRIDGE = find_spec("transformer_lens.model_bridge") is not None
PAGE = Path(__file__).parents[1] / "docs" / "saelens.md"


def snippets(language: str) -> list[tuple[int, str]]:
    """Each snippet with the number of its first line."""
    text = PAGE.read_text()
    return [
        (text[: match.start(1)].count("\n"), match[1])
        for match in re.finditer(rf"```{language}\n(.*?)```", text, re.DOTALL)
    ]


def test_every_snippet_and_command_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    with running_hub(tmp_path / "hub-cache"):
        for line, source in snippets("python"):
            # Comes with transformer-lens 3.
            if "TransformerBridge" in source and not HAS_BRIDGE:
                continue
            # Tracebacks show the line of the page.
            exec(compile("\n" * line + source, PAGE, "exec"), namespace)

    monkeypatch.setenv("MODEL_FOLDER", str(smollm2_folder()))
    ((_, commands),) = snippets("bash")
    for command in commands.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(os.path.expandvars(command))
        assert program == "sae-lens-scale"
        assert main(arguments) == 0, command

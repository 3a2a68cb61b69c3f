"""The Python of docs/saelens.md, from its top to its bottom."""

import re
from pathlib import Path
from typing import Any

import pytest
from integration.hub import running_hub

PAGE = Path(__file__).parents[1] / "docs" / "saelens.md"


def snippets() -> list[tuple[int, str]]:
    """Each snippet with the number of its first line."""
    text = PAGE.read_text()
    return [
        (text[: match.start(1)].count("\n"), match[1])
        for match in re.finditer(r"```python\n(.*?)```", text, re.DOTALL)
    ]


def test_every_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    with running_hub(tmp_path / "hub-cache"):
        for line, source in snippets():
            # Tracebacks show the line of the page.
            exec(compile("\n" * line + source, PAGE, "exec"), namespace)

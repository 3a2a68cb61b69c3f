"""Code of the pages of docs/."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HAS_BRIDGE = find_spec("transformer_lens.model_bridge") is not None


def run_python(page: Path, namespace: dict[str, Any]) -> None:
    """Run each Python snippet of a page whose packages are there, from top to bottom."""
    for line, source in snippets(page, "python"):
        # Comes with transformer-lens 3.
        if "TransformerBridge" in source and not HAS_BRIDGE:
            continue
        if not all(find_spec(name) for name in _packages(source)):
            continue
        # Tracebacks show the line of the page.
        exec(compile("\n" * line + source, page, "exec"), namespace)


def snippets(page: Path, language: str) -> list[tuple[int, str]]:
    """Each snippet with the number of its first line."""
    text = page.read_text()
    return [
        (text[: match.start(1)].count("\n"), match[1])
        for match in re.finditer(rf"```{language}\n(.*?)```", text, re.DOTALL)
    ]


def _packages(source: str) -> set[str]:
    """Packages that a snippet imports from."""
    nodes = list(ast.walk(ast.parse(source)))
    modules = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    modules += [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    return {module.partition(".")[0] for module in modules}

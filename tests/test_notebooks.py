"""The notebooks of the examples run, and are kept with the outputs of a whole run."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = ["train_and_compare", "explore"]


def read(name: str) -> Any:
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def run(name: str, folder: Path, **parameters: Any) -> str:
    """
    Run a notebook in a folder, with other parameters.

    Returns:
        What it printed and displayed, as text.
    """
    notebook = read(name)
    (settings,) = (
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])
    )
    for parameter, value in parameters.items():
        assert f"{parameter} = " in settings.source
        settings.source += f"\n{parameter} = {value!r}"
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, resources=resources).execute()
    return printed(notebook)


def printed(notebook: Any) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(o.get("text", "") or o.data["text/plain"] for o in outputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder in the place of examples/."""
    folder = tmp_path_factory.mktemp("checkout") / "examples"
    folder.mkdir()
    return folder

"""The notebooks of the examples run, and are kept with the outputs of a whole run."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from sae_lens import SAE

from sae_lens_scale.upstream import buffer_argument

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = ["train_and_compare", "explore"]


def read(name: str) -> Any:
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def run(name: str, checkout: Path, **parameters: Any) -> str:
    """
    Run a notebook in the folder examples/ of a checkout, with other parameters.

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
    folder = checkout / "examples"
    folder.mkdir()
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(o.get("text", "") or o.data["text/plain"] for o in outputs)


# Of a run in seconds: SAELens fills its buffer, and estimates the activations' norm, first, and
# nearly all of the time is the language model's.
SMALL = {
    "D_SAE": 2_304,
    "TRAINING_TOKENS": 2_048,
    "OVERRIDES": {
        "context_size": 64,
        "n_batches_for_norm_estimate": 2,
        **buffer_argument(16),
    },
}


def test_train_and_compare_leaves_three_SAEs_of_equal_cost_and_compares_them(
    tmp_path: Path,
):
    out = run("train_and_compare", tmp_path, EVAL_BATCHES=1, EVAL_PROMPTS=2, **SMALL)
    sizes = {}
    for name in ("scale", "switch", "topk"):
        cfg: Any = SAE.load_from_disk(tmp_path / "outputs/train_and_compare" / name).cfg
        assert cfg.architecture() == name
        sizes[name] = getattr(cfg, "expert_size", cfg.d_sae) * getattr(
            cfg, "experts_per_token", 1
        )
    assert set(sizes.values()) == {72}
    rows = re.findall(r"^(Scale|Switch|TopK) +(\d+) +(\d+) ", out, re.MULTILINE)
    assert rows == [
        ("Scale", "2304", "72"),
        ("Switch", "2304", "72"),
        ("TopK", "72", "72"),
    ]
    assert "variance unexplained" in out


def test_explore_trains_an_SAE_where_there_is_none_and_explores_it(
    tmp_path: Path,
):
    # Enough for an SAE that has learned next to nothing.
    out = run("explore", tmp_path, BATCHES=1, STRENGTH=400.0, WORDS=6, **SMALL)
    assert SAE.load_from_disk(tmp_path / "outputs/explore").cfg.d_sae == 2_304
    assert "2,304 latents in 64 experts" in out
    contexts = re.findall(r"^ +\d+\.\d  .*«.+».*$", out, re.MULTILINE)
    assert 1 <= len(contexts) <= 8
    written = dict(re.findall(r"^(as it is|turned up): +(.*)$", out, re.MULTILINE))
    assert written["as it is"] != written["turned up"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_with_the_outputs_of_a_whole_run(name: str):
    notebook = read(name)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    # Neither warnings and progress bars nor errors.
    assert not [o for o in outputs if o.get("name") == "stderr"]
    assert {o.output_type for o in outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert (EXAMPLES / f"{name}.ipynb").stat().st_size < 1_000_000

"""Names and files of results."""

from pathlib import Path

import pytest
import torch

from sae_lens_scale.analysis.scores.stored import digest, stored


def test_other_settings_or_tensors_have_another_name():
    x = torch.arange(6.0)
    cases = [
        digest({}),
        digest({"k": 1}),
        digest({"k": 2}),
        digest({"k": 1}, [("x", x)]),
        digest({"k": 1}, [("y", x)]),
        digest({"k": 1}, [("x", x.view(2, 3))]),
        digest({"k": 1}, [("x", x.int())]),
        digest({"k": 1}, [("x", x + 1)]),
    ]
    assert len(set(cases)) == len(cases)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    # Of another layout, or type that NumPy lacks.
    columns = x.view(2, 3).T
    assert digest({}, [("x", columns)]) == digest({}, [("x", columns.contiguous())])
    assert digest({}, [("x", x.bfloat16())]) != digest({}, [("x", x.half())])


def test_a_result_is_computed_once(tmp_path: Path):
    file = tmp_path / "folder" / "result.json"
    assert stored(file, lambda: {"auc": 0.5}) == {"auc": 0.5}
    assert stored(file, lambda: {"auc": 1.0}) == {"auc": 0.5}
    assert list(file.parent.iterdir()) == [file]


def test_nothing_is_kept_of_what_fails(tmp_path: Path):
    def fail() -> dict[str, float]:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        stored(tmp_path / "result.json", fail)
    assert list(tmp_path.iterdir()) == []

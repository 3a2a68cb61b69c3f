"""Texts of the experiments by name."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from reproduction import text as module
from reproduction.text import fetch_debian, load_text


def texts(name: str, split: Any) -> list[str]:
    documents: Any = load_text(name, split)
    return list(documents["text"])


def test_other_names_are_those_of_the_package(tmp_path: Path):
    (tmp_path / "one.txt").write_text("One text.")
    assert texts(str(tmp_path), "all") == ["One text."]


def test_hle_biomedical_is_questions_and_answers_of_one_category(
    monkeypatch: pytest.MonkeyPatch,
):
    rows = {
        "id": [1, 2, 3],
        "question": ["What beats?", "What is 1 + 1?", "What breathes?"],
        "answer": ["The heart.", "2", "The lungs."],
        "category": ["Biology/Medicine", "Math", "Biology/Medicine"],
    }

    def load(name: str, split: str) -> Dataset:
        assert (name, split) == ("cais/hle", "test")
        return Dataset.from_dict(rows)

    monkeypatch.setattr(module, "load_dataset", load)
    want = ["What beats?\nThe heart.", "What breathes?\nThe lungs."]
    assert texts("hle-biomedical", "all") == want
    with pytest.raises(ValueError, match="must be 'all' for hle-biomedical"):
        load_text("hle-biomedical", "train")


def test_Debians_package_is_fetched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SAE_LENS_SCALE_CACHE", str(tmp_path / "cache"))
    inside = Path("usr/share/doc/anarchism/html-of-a-test")
    monkeypatch.setitem(module._DEBIAN, "anarchism", inside)
    commands = []

    def run(command: list[str], cwd: str, **_: Any) -> None:
        commands.append(command[-1])
        if command[-1].startswith("dpkg"):
            folder = Path(cwd, "unpacked", inside)
            folder.mkdir(parents=True)
            (folder / "a.html").write_text("<p>Text.</p>")

    monkeypatch.setattr(subprocess, "run", run)
    assert texts("anarchism", "all") == ["Text."]
    assert [c.split()[0] for c in commands] == ["apt-get", "dpkg"]
    assert fetch_debian("anarchism") == tmp_path / "cache" / "anarchism" / inside
    assert len(commands) == 2


def test_a_failed_download_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SAE_LENS_SCALE_CACHE", str(tmp_path))
    monkeypatch.setitem(module._DEBIAN, "anarchism", Path("html-of-a-test"))

    def run(*_: Any, **__: Any) -> None:
        raise subprocess.CalledProcessError(100, "apt-get", stderr="E: no network\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"\(E: no network\). Install it, or unpack"):
        fetch_debian("anarchism")
    assert not list(tmp_path.iterdir())

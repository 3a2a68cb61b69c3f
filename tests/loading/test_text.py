"""Texts by name."""

import gzip
import subprocess
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from sae_lens_scale.loading import text as module
from sae_lens_scale.loading.text import fetch_anarchism, load_text


def texts(name: Path, split: Any) -> list[str]:
    documents: Any = load_text(str(name), split)
    return list(documents["text"])


def test_a_folder_is_split_by_document_without_overlap(tmp_path: Path):
    for i in range(45):
        suffix = ".txt" if i % 2 else ".md"
        (tmp_path / f"{i:02}{suffix}").write_text(f"Document {i}.\n")
    (tmp_path / "picture.png").write_bytes(b"no text")
    (tmp_path / "empty.txt").touch()
    train, test, both = (texts(tmp_path, s) for s in ("train", "test", "all"))
    assert both == [f"Document {i}." for i in range(45)]
    assert test == ["Document 0.", "Document 20.", "Document 40."]
    assert sorted(train + test) == sorted(both)
    assert texts(tmp_path / "07.txt", "all") == ["Document 7."]


def test_a_folder_of_data_files_is_a_data_set(tmp_path: Path):
    lines = [f'{{"text": "Document {i}."}}' for i in range(2_005)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    split: Any
    for split, numbers in (("train", range(2_000, 2_005)), ("test", range(2_000))):
        rows: Any = list(load_text(str(tmp_path), split))
        assert [row["text"] for row in rows] == [f"Document {i}." for i in numbers]


def test_the_page_about_a_data_set_is_no_text_of_it(tmp_path: Path):
    (tmp_path / "README.md").write_text("# A data set")
    assert texts(tmp_path, "all") == ["# A data set"]
    lines = [f'{{"text": "Document {i}."}}' for i in range(3)]
    with gzip.open(tmp_path / "texts.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    rows: Any = list(load_text(str(tmp_path), "all"))
    assert [row["text"] for row in rows] == [f"Document {i}." for i in range(3)]
    (tmp_path / "text.md").write_text("A text.")
    assert texts(tmp_path, "all") == ["# A data set", "A text."]


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
    assert texts(Path("hle-biomedical"), "all") == want


def test_html_is_read_as_a_reader_sees_it(tmp_path: Path):
    (tmp_path / "page.html").write_text(
        "<html><head><title>hidden</title><style>p {}</style></head><body>\n"
        "<h1>Why &amp; how</h1>\n<p>One <i>long</i>\nsentence.</p><p></p>"
        "<script>hidden()</script><ul><li>first</li><li>second</li></ul></body></html>"
    )
    assert texts(tmp_path, "all") == ["Why & how\nOne long sentence.\nfirst\nsecond"]


def test_what_is_no_text_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        load_text(str(tmp_path), "all")
    (tmp_path / "one.txt").write_text("One text.")
    with pytest.raises(ValueError, match="must hold more than one text"):
        load_text(str(tmp_path / "one.txt"), "train")
    with pytest.raises(ValueError, match="split must be 'train', 'test' or 'all'"):
        texts(tmp_path, "nonsense")
    with pytest.raises(ValueError, match="'train' or 'test' for docstrings"):
        load_text("docstrings", "all")
    with pytest.raises(ValueError, match="must be 'all' for hle-biomedical"):
        load_text("hle-biomedical", "train")


def test_Debians_package_is_fetched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SAE_LENS_SCALE_CACHE", str(tmp_path / "cache"))
    inside = Path("usr/share/doc/anarchism/html-of-a-test")
    monkeypatch.setattr(module, "_ANARCHISM", inside)
    commands = []

    def run(command: list[str], cwd: str, **_: Any) -> None:
        commands.append(command[-1])
        if command[-1].startswith("dpkg"):
            folder = Path(cwd, "anarchism", inside)
            folder.mkdir(parents=True)
            (folder / "a.html").write_text("<p>Text.</p>")

    monkeypatch.setattr(subprocess, "run", run)
    assert texts(Path("anarchism"), "all") == ["Text."]
    assert [c.split()[0] for c in commands] == ["apt-get", "dpkg"]
    assert fetch_anarchism() == tmp_path / "cache" / "anarchism" / inside
    assert len(commands) == 2


def test_a_failed_download_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SAE_LENS_SCALE_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_ANARCHISM", Path("html-of-a-test"))

    def run(*_: Any, **__: Any) -> None:
        raise subprocess.CalledProcessError(100, "apt-get", stderr="E: no network\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"\(E: no network\). Install it, or unpack"):
        fetch_anarchism()
    assert not list(tmp_path.iterdir())

"""Texts by name."""

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from integration.runs import new_sae
from sae_lens import HookedSAETransformer
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_scale.loading.text import load_text, skip_missing_texts


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


def test_html_is_read_as_a_reader_sees_it(tmp_path: Path):
    (tmp_path / "page.html").write_text(
        "<html><head><title>hidden</title><style>p {}</style></head><body>\n"
        "<h1>Why &amp; how</h1>\n<p>One <i>long</i>\nsentence.</p><p></p>"
        "<script>hidden()</script><ul><li>first</li><li>second</li></ul></body></html>"
    )
    assert texts(tmp_path, "all") == ["Why & how\nOne long sentence.\nfirst\nsecond"]


def test_what_is_no_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(FileNotFoundError):
        load_text(str(tmp_path), "all")
    (tmp_path / "one.txt").write_text("One text.")
    with pytest.raises(ValueError, match="must hold more than one text"):
        load_text(str(tmp_path / "one.txt"), "train")
    # Not the texts of the current folder.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="name must not be empty"):
        load_text("", "all")
    with pytest.raises(ValueError, match="split must be 'train', 'test' or 'all'"):
        texts(tmp_path, "nonsense")
    with pytest.raises(ValueError, match="'train' or 'test' for docstrings"):
        load_text("docstrings", "all")


def test_a_data_set_that_is_held_out_whole_is_refused(tmp_path: Path):
    rows = '{"text": "A document."}\n' * 2_000
    (tmp_path / "texts.jsonl").write_text(rows)
    with pytest.raises(ValueError, match="must hold more than the 2,000 documents"):
        load_text(str(tmp_path), "train")


def test_a_folder_may_be_a_path_and_its_files_begin_with_a_mark(tmp_path: Path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"Document {i}.", encoding="utf-8-sig")
    documents: Any = load_text(tmp_path, "all")
    assert list(documents["text"]) == [f"Document {i}." for i in range(3)]
    data = tmp_path / "data"
    data.mkdir()
    (data / "texts.jsonl").write_text('{"text": "A document."}')
    assert list(load_text(data, "all")) == [{"text": "A document."}]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_text_are_passed_over(
    streaming: bool, tiny_model: HookedSAETransformer
):
    texts = [f"Document {i}. " * 20 for i in range(5)]
    with_nulls = Dataset.from_dict({"text": [None, *texts[:2], None, *texts[2:]]})
    dataset: Any = with_nulls.to_iterable_dataset() if streaming else with_nulls
    stores = [
        ActivationsStore.from_sae(tiny_model, new_sae("scale"), text)
        for text in (Dataset.from_dict({"text": texts}), dataset)
    ]
    skip_missing_texts(stores[1])
    want, got = (list(store.iterable_sequences) for store in stores)
    assert len(want) > 5
    assert torch.equal(torch.stack(got), torch.stack(want))


def test_rows_of_tokens_are_left_as_they_are(tiny_model: HookedSAETransformer):
    rows = Dataset.from_dict({"tokens": [[1] * 16] * 2})
    store = ActivationsStore.from_sae(tiny_model, new_sae("scale"), rows)
    skip_missing_texts(store)
    assert store.dataset is rows

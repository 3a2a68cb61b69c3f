"""Texts by name: docstrings, files on disk, data sets of the hub; rows without text."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, IterableDataset, load_dataset
from sae_lens.training.activations_store import ActivationsStore
from typing_extensions import override

from .docstrings import docstring_corpus

# Documents of a data set that are held out for evaluation, and the step from one to the next
# in a folder.
_HELD_OUT_DOCUMENTS = 2_000
_HELD_OUT_ONE_IN = 20
_SUFFIXES = (".txt", ".md", ".html")
# Files of a data set, and the page about it, which is not a text of it.
_DATA_SUFFIXES = {".arrow", ".csv", ".json", ".jsonl", ".parquet"}
_CARD = "README.md"


def load_text(
    name: str | Path, split: Literal["train", "test", "all"]
) -> Dataset | IterableDataset:
    """
    Load a text to run a language model on.

    Args:
        name: "docstrings" (of the installed packages); a file or folder of .txt, .md and
            .html files, searched with its subfolders; or a data set with a column "text",
            on the hub or in a folder.
        split: "train" and "test" share no document; "all" is both.

    Returns:
        The documents, in the column ``"text"``.

    Raises:
        ValueError: ``name`` is empty, ``split`` is none of the three, or there are too few
            texts to split.
        FileNotFoundError: There is no such text.
    """
    name = str(name)
    if not name:
        # As a folder, it would be the current one.
        raise ValueError("name must not be empty")
    if split not in ("train", "test", "all"):
        raise ValueError(f"split must be 'train', 'test' or 'all', got {split!r}")
    if name == "docstrings":
        if split == "all":
            raise ValueError("split must be 'train' or 'test' for docstrings")
        return docstring_corpus(split)
    if documents := _read_files(Path(name)):
        test = documents[::_HELD_OUT_ONE_IN]
        if split == "train":
            held_out = set(test)
            documents = [text for text in documents if text not in held_out]
            if not documents:
                raise ValueError(f"{name} must hold more than one text to hold one out")
        return Dataset.from_dict({"text": test if split == "test" else documents})
    dataset = load_dataset(name, split="train", streaming=True)
    if split == "train":
        rest = dataset.skip(_HELD_OUT_DOCUMENTS)
        if next(iter(rest), None) is None:
            raise ValueError(
                f"{name} must hold more than the {_HELD_OUT_DOCUMENTS:,} documents that "
                "are held out"
            )
        return rest
    return dataset.take(_HELD_OUT_DOCUMENTS) if split == "test" else dataset


def skip_missing_texts(store: ActivationsStore) -> None:
    """
    Let a store pass over rows whose text is null, where SAELens would stop with an error.

    Args:
        store: The store, of which nothing was read yet.
    """
    dataset: Any = store.dataset
    if dataset is None or store.is_dataset_tokenized:
        return
    column = store.tokens_column
    # Rows on disk are filtered at once, which takes long; of a stream, as they come.
    if isinstance(dataset, IterableDataset) or (
        isinstance(dataset, Dataset) and dataset.data.column(column).null_count
    ):
        store.dataset = dataset.filter(_is_there, input_columns=column)


def _is_there(text: Any) -> bool:
    return text is not None


def _read_files(path: Path) -> list[str]:
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [
        file
        for file in found
        if file.is_file() and (file.suffix in _SUFFIXES or file == path)
    ]
    if all(file.name == _CARD for file in files) and any(
        set(file.suffixes) & _DATA_SUFFIXES for file in found
    ):
        return []
    return [text for text in map(_read_file, files) if text]


def _read_file(path: Path) -> str:
    # Some editors begin a file with a byte order mark.
    text = path.read_text(encoding="utf-8-sig", errors="ignore")
    if path.suffix == ".html":
        parser = _TextOfHTML()
        parser.feed(text)
        parser.close()
        text = "".join(parser.parts)
        lines = (" ".join(line.split()) for line in text.splitlines())
        text = "\n".join(line for line in lines if line)
    return text.strip()


class _TextOfHTML(HTMLParser):
    """Collector of the visible text of a page, each block on a line of its own."""

    _HIDDEN = ("head", "script", "style")
    _BLOCKS = ("p", "h1", "h2", "h3", "h4", "h5", "h6", "li", "br", "tr", "div")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in self._HIDDEN
        if tag in self._BLOCKS:
            self.parts.append("\n")

    @override
    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in self._HIDDEN and self._hidden > 0

    @override
    def handle_data(self, data: str) -> None:
        if not self._hidden:
            # A line may end anywhere within a paragraph.
            self.parts.append(data.replace("\n", " "))

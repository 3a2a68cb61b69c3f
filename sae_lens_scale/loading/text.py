"""The texts of the experiments, by name: docstrings, files on disk, data sets of the hub."""

import subprocess
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, IterableDataset, load_dataset
from typing_extensions import override

from sae_lens_scale.loading.smollm2 import default_cache_dir

from .docstrings import docstring_corpus

# Documents that are held out for evaluation: of a data set of the hub, and one in how many
# of a folder.
_HELD_OUT_DOCUMENTS = 2_000
_HELD_OUT_ONE_IN = 20
_ANARCHISM = Path("usr/share/doc/anarchism/html")
_SUFFIXES = (".txt", ".md", ".html")
# Files of a data set, and the page about it, which is no text of it.
_DATA_SUFFIXES = {".arrow", ".csv", ".json", ".jsonl", ".parquet"}
_CARD = "README.md"


def load_text(
    name: str, split: Literal["train", "test", "all"]
) -> Dataset | IterableDataset:
    """
    Load a text to run a language model on.

    Args:
        name: "docstrings" (of the installed packages); "anarchism" (An Anarchist FAQ, prose
            on politics and history, from Debian's package of that name, which is fetched
            with apt-get where it is not installed); a file or folder of .txt, .md and
            .html files, searched with its subfolders; "hle-biomedical" (the biomedical
            questions of Humanity's Last Exam, ``cais/hle`` on the hub, which asks its
            users to log in); or a data set with a column "text", on the hub or in a folder.
        split: "train" and "test" share no document; "all" is both.

    Returns:
        The documents, in the column ``"text"``.

    Raises:
        ValueError: ``split`` is none of the three, or there are too few texts to split.
        FileNotFoundError: There is no such text.
        RuntimeError: Debian's package could not be fetched.
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"split must be 'train', 'test' or 'all', got {split!r}")
    if name == "docstrings":
        if split == "all":
            raise ValueError("split must be 'train' or 'test' for docstrings")
        return docstring_corpus(split)
    if name == "anarchism":
        name = str(fetch_anarchism())
    if documents := _read_files(Path(name)):
        test = documents[::_HELD_OUT_ONE_IN]
        if split == "train":
            held_out = set(test)
            documents = [text for text in documents if text not in held_out]
            if not documents:
                raise ValueError(f"{name} must hold more than one text to hold one out")
        return Dataset.from_dict({"text": test if split == "test" else documents})
    if name == "hle-biomedical":
        return _hle_biomedical(split)
    dataset = load_dataset(name, split="train", streaming=True)
    if split == "train":
        return dataset.skip(_HELD_OUT_DOCUMENTS)
    return dataset.take(_HELD_OUT_DOCUMENTS) if split == "test" else dataset


def fetch_anarchism() -> Path:
    """
    Find the text of Debian's package ``anarchism``, fetching it if it is missing.

    Returns:
        Folder of the text, in HTML: the installed package's, or one in the cache, which
        ``SAE_LENS_SCALE_CACHE`` names.

    Raises:
        RuntimeError: It could not be fetched. The message says how to do it by hand.
    """
    installed = Path("/", _ANARCHISM)
    cached = default_cache_dir() / "anarchism"
    if installed.is_dir():
        return installed
    if not (cached / _ANARCHISM).is_dir():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".download-", dir=cached.parent
        ) as temporary:
            try:
                for command in (
                    "apt-get download -q anarchism",
                    "dpkg -x anarchism_*.deb anarchism",
                ):
                    subprocess.run(
                        ["sh", "-c", command],
                        cwd=temporary,
                        check=True,
                        text=True,
                        capture_output=True,
                    )
            except subprocess.CalledProcessError as error:
                raise RuntimeError(
                    f"Debian's package anarchism could not be fetched "
                    f"({error.stderr.strip()}). Install it, or unpack it with dpkg -x in "
                    f"{cached}."
                ) from error
            # Whole or not at all.
            Path(temporary, "anarchism").rename(cached)
    return cached / _ANARCHISM


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
    text = path.read_text(encoding="utf-8", errors="ignore")
    if path.suffix == ".html":
        parser = _TextOfHTML()
        parser.feed(text)
        parser.close()
        text = "".join(parser.parts)
        lines = (" ".join(line.split()) for line in text.splitlines())
        text = "\n".join(line for line in lines if line)
    return text.strip()


class _TextOfHTML(HTMLParser):
    """Collects what a reader sees, each block on a line of its own."""

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


def _hle_biomedical(split: str) -> Dataset:
    if split != "all":
        raise ValueError("split must be 'all' for hle-biomedical: it is too short")
    questions: Any = load_dataset("cais/hle", split="test")
    rows = questions.remove_columns(
        [
            c
            for c in questions.column_names
            if c not in ("question", "answer", "category")
        ]
    ).filter(lambda row: row["category"] == "Biology/Medicine")
    return Dataset.from_dict(
        {"text": [f"{row['question']}\n{row['answer']}" for row in rows]}
    )

"""Texts of the experiments: those of the package, two of Debian's, and biomedical questions."""

import subprocess
import tempfile
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, IterableDataset, load_dataset

from sae_lens_scale.loading import text
from sae_lens_scale.loading.smollm2 import default_cache_dir

# Folders of texts in Debian's packages, by the package's name.
_DEBIAN = {
    "anarchism": Path("usr/share/doc/anarchism/html"),
    "debian-handbook": Path("usr/share/doc/debian-handbook/html/en-US"),
}


def load_text(
    name: str, split: Literal["train", "test", "all"]
) -> Dataset | IterableDataset:
    """
    Load a text to run a language model on: documents in the column ``"text"``.

    Args:
        name: "anarchism" (An Anarchist FAQ, prose on politics and history) or
            "debian-handbook" (The Debian Administrator's Handbook), from Debian's package of
            that name, which is fetched with apt-get where it is not installed;
            "hle-biomedical" (the biomedical questions of Humanity's Last Exam, ``cais/hle``
            on the hub, which asks its users to log in); or any name that
            :func:`sae_lens_scale.loading.text.load_text` takes.
        split: "train" and "test" share no document; "all" is both.

    Raises:
        ValueError: ``split`` is none of the three, or there are too few texts to split.
        FileNotFoundError: There is no such text.
        RuntimeError: Debian's package could not be fetched.
    """
    if name == "hle-biomedical":
        return _hle_biomedical(split)
    if name in _DEBIAN:
        name = str(fetch_debian(name))
    return text.load_text(name, split)


def fetch_debian(package: str) -> Path:
    """
    Find the text of one of Debian's packages, in HTML: the installed package's, or one in the
    cache, which ``SAE_LENS_SCALE_CACHE`` names, fetched if it is missing.

    Args:
        package: "anarchism" or "debian-handbook".

    Raises:
        RuntimeError: It could not be fetched. The message says how to do it by hand.
    """
    installed = Path("/", _DEBIAN[package])
    cached = default_cache_dir() / package
    if installed.is_dir():
        return installed
    if not (cached / _DEBIAN[package]).is_dir():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".download-", dir=cached.parent
        ) as temporary:
            options: Any = {"cwd": temporary, "text": True, "capture_output": True}
            fetch = f"apt-get download -q {package}"
            unpack = f"dpkg -x {package}_*.deb unpacked"
            try:
                for command in (fetch, unpack):
                    subprocess.run(["sh", "-c", command], check=True, **options)
            except subprocess.CalledProcessError as error:
                raise RuntimeError(
                    f"Debian's package {package} could not be fetched "
                    f"({error.stderr.strip()}). Install it, or unpack it with dpkg -x in "
                    f"{cached}."
                ) from error
            # Whole or not at all.
            Path(temporary, "unpacked").rename(cached)
    return cached / _DEBIAN[package]


def _hle_biomedical(split: str) -> Dataset:
    if split != "all":
        raise ValueError("split must be 'all' for hle-biomedical: it is too short")
    questions: Any = load_dataset("cais/hle", split="test")
    rows = questions.select_columns(["question", "answer", "category"]).filter(
        lambda row: row["category"] == "Biology/Medicine"
    )
    return Dataset.from_dict(
        {"text": [f"{row['question']}\n{row['answer']}" for row in rows]}
    )

import sys
from contextlib import suppress
from pathlib import Path
from typing import Literal
from unittest.mock import MagicMock

import pytest

from sae_lens_scale.loading import docstrings as corpus
from sae_lens_scale.loading.docstrings import docstring_corpus
from sae_lens_scale.loading.smollm2 import CACHE_VARIABLE


def _prose(subject: object = "anything") -> str:
    return (
        f"Nobody wrote such a sentence about {subject} before this one. " * 4 + "End."
    )


def _write(folder: Path, name: str, source: str | bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source if isinstance(source, bytes) else source.encode())


def _split(split: Literal["train", "test"], root: Path, **settings: int) -> list[str]:
    documents = docstring_corpus(
        split, roots=[root], min_total_characters=0, **settings
    )
    return list(documents["text"])


def _texts(root: Path, **settings: int) -> list[str]:
    """The documents of both splits, of which one may have none."""
    texts: list[str] = []
    for split in ("train", "test"):
        with suppress(RuntimeError):
            texts += _split(split, root, **settings)
    return texts


@pytest.fixture(autouse=True)
def cache_folder(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Cache of its own, so that nothing is kept for other tests."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """200 modules of a package, with a different docstring each."""
    for i in range(200):
        _write(tmp_path / "here", f"package/module_{i}.py", f'"""{_prose(i)}"""')
    return tmp_path / "here"


def test_docstring_corpus_makes_a_document_of_each_module_and_class(tmp_path: Path):
    source = f'''
"""{_prose("modules")}"""

def function():
    """{_prose("functions")}"""

class Outer:
    """{_prose("classes")}

    Indented like its class.
    """

    async def method(self):
        """{_prose("methods")}"""

    class Inner:
        """{_prose("inner classes")}"""

raise SystemExit  # if it were imported
'''
    _write(tmp_path, "package/module.py", source)
    assert sorted(_texts(tmp_path)) == sorted(
        [
            f"{_prose('modules')}\n\n{_prose('functions')}",
            f"{_prose('classes')}\n\nIndented like its class.\n\n{_prose('methods')}",
            _prose("inner classes"),
        ]
    )


def test_docstring_corpus_uses_a_docstring_once(tmp_path: Path):
    for name in ("a.py", "b.py", "c/d.py"):
        _write(tmp_path, name, f'"""{_prose()}"""')
    assert _texts(tmp_path) == [_prose()]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("a.py", b'"""' + _prose().encode() + b'\xff"""'),  # not UTF-8
        ("a.py", b'"""' + _prose().encode() + b'\x00"""'),
        ("a.py", f'"""{_prose()}"""\nprint "Python 2"'),
        ("a.py", f'"""{_prose()}'),
        ("a.py", f'# This file was auto-generated, do not edit.\n"""{_prose()}"""'),
        ("a.py", '"""Too short."""'),
        ("a.py", '"""' + "x[0, 1:2] = {'a': (3.14, -2)}\n" * 20 + '"""'),
        *(
            (name, f'"""{_prose()}"""')
            for name in ("tests/a.py", "pkg/test/a.py", "test_a.py", "a.txt")
        ),
    ],
)
def test_docstring_corpus_passes_over_tests_and_files_without_usable_prose(
    tmp_path: Path, name: str, source: str | bytes
):
    _write(tmp_path, "good.py", f'"""{_prose("the good file")}"""')
    _write(tmp_path, name, source)
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    assert _texts(tmp_path) == [_prose("the good file")]


def test_docstring_corpus_splits_long_documents(tmp_path: Path):
    functions = (f'def f{i}():\n    """{_prose(i)}"""\n' for i in range(20))
    _write(tmp_path, "module.py", "\n".join(functions))
    texts = _texts(tmp_path, max_characters=1000)
    assert sum(text.count("Nobody") for text in texts) == 80
    assert max(map(len, texts)) <= 1000


def test_docstring_corpus_drops_half_characters(tmp_path: Path):
    _write(tmp_path, "module.py", f'"""{_prose()} \\ud800"""')
    assert _texts(tmp_path) == [f"{_prose()}"]


def test_docstring_corpus_has_disjoint_splits_that_cover_everything(packages: Path):
    train, test = set(_split("train", packages)), set(_split("test", packages))
    assert len(train) + len(test) == len(train | test) == 200
    assert 1 <= len(test) <= 30


def test_docstring_corpus_splits_by_the_path_within_the_root(packages: Path):
    test = _split("test", packages)
    moved = packages.rename(packages.with_name("elsewhere"))
    assert _split("test", moved) == test


def test_docstring_corpus_is_shuffled_by_the_seed_alone(packages: Path):
    order = _split("train", packages)
    assert _split("train", packages) == order
    assert _split("train", packages, seed=1) != order
    assert sorted(_split("train", packages, seed=1)) == sorted(order)
    assert _split("train", packages, max_documents=7) == order[:7]


def test_docstring_corpus_refuses_too_little_text_and_unknown_splits(packages: Path):
    with pytest.raises(RuntimeError, match="Found only .* characters of docstrings"):
        docstring_corpus("train", roots=[packages])
    with pytest.raises(ValueError, match="'validation'"):
        docstring_corpus("validation", roots=[packages])  # type: ignore[arg-type]
    for name in ("max_documents", "max_characters"):
        with pytest.raises(ValueError, match=f"{name} must be positive, got -1"):
            _split("train", packages, **{name: -1})


def test_one_folder_needs_no_list(packages: Path):
    one = docstring_corpus("train", roots=str(packages), min_total_characters=0)
    assert list(one["text"]) == _split("train", packages)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """The function that reads files, watched."""
    watched = MagicMock(wraps=corpus._read)
    monkeypatch.setattr(corpus, "_read", watched)
    return watched


def test_docstring_corpus_reads_the_files_once(packages: Path, read: MagicMock):
    first = [_split("train", packages), _split("test", packages)]
    assert [_split("train", packages), _split("test", packages)] == first
    assert read.call_count == 1
    # Other settings make another text.
    assert _texts(packages, min_characters=10_000) == []


def test_docstring_corpus_notices_changed_files(packages: Path, cache_folder: Path):
    before = _split("train", packages)
    module = packages / "package" / "module_0.py"
    # Of the same length as before.
    _write(packages, "package/module_0.py", f'"""{_prose("Z")}"""')
    after = _texts(packages)
    assert _prose("Z") in after and _prose(0) not in after
    module.unlink()
    assert len(_texts(packages)) == 199
    _write(packages, "package/module_0.py", f'"""{_prose(0)}"""')
    assert _split("train", packages) == before
    # Of one set of folders it keeps one text.
    assert len(list(cache_folder.iterdir())) == 1


def test_docstring_corpus_is_read_again_by_another_reader(
    packages: Path, tmp_path: Path, read: MagicMock, monkeypatch: pytest.MonkeyPatch
):
    _split("train", packages)
    monkeypatch.setattr(sys, "version_info", (3, 99, 0))
    _split("train", packages)
    assert read.call_count == 2
    (tmp_path / "corpus.py").write_text("# another")
    monkeypatch.setattr(corpus, "__file__", str(tmp_path / "corpus.py"))
    _split("train", packages)
    assert read.call_count == 3


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"state": 0}'])
def test_docstring_corpus_mends_a_broken_cache(
    packages: Path, cache_folder: Path, content: str
):
    expected = _split("train", packages)
    (cached,) = cache_folder.iterdir()
    kept = cached.read_text()
    cached.write_text(content)
    assert _split("train", packages) == expected
    assert cached.read_text() == kept


def test_docstring_corpus_needs_no_cache(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = _split("train", packages)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "folder"))
    assert _split("train", packages) == expected

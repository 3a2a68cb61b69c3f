from pathlib import Path

import pytest

from sae_lens_scale.experiments.corpus import docstring_corpus

PROSE = "This sentence says something that nobody has written before, about {}. " * 4


def _write(folder: Path, name: str, source: str | bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source if isinstance(source, bytes) else source.encode())


def _texts(*roots: Path, **settings: int) -> list[str]:
    """The documents of both splits; one of them may be empty."""
    texts: list[str] = []
    for split in ("train", "test"):
        try:
            corpus = docstring_corpus(
                split, roots=roots, min_total_characters=0, **settings
            )
        except RuntimeError:
            continue
        texts += corpus["text"]
    return texts


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """200 modules of a package, with a different docstring each."""
    for i in range(200):
        _write(tmp_path, f"package/module_{i}.py", f'"""{PROSE.format(i)}"""')
    return tmp_path


def test_docstring_corpus_makes_a_document_of_each_module_and_class(tmp_path: Path):
    source = f'''
"""{PROSE.format("modules")}"""

def function():
    """{PROSE.format("functions")}"""

class Outer:
    """{PROSE.format("classes")}

        indented
    """

    async def method(self):
        """{PROSE.format("methods")}"""

    class Inner:
        """{PROSE.format("inner classes")}"""
'''
    _write(tmp_path, "package/module.py", source)
    assert sorted(_texts(tmp_path)) == sorted(
        [
            f"{PROSE.format('modules').strip()}\n\n{PROSE.format('functions').strip()}",
            f"{PROSE.format('classes').strip()}\n\n    indented\n\n"
            f"{PROSE.format('methods').strip()}",
            PROSE.format("inner classes").strip(),
        ]
    )


def test_docstring_corpus_never_imports_what_it_reads(tmp_path: Path):
    _write(tmp_path, "module.py", f'"""{PROSE}"""\nraise SystemExit')
    assert _texts(tmp_path) == [PROSE.strip()]


def test_docstring_corpus_uses_a_docstring_once(tmp_path: Path):
    for name in ("a.py", "b.py", "c/d.py"):
        _write(tmp_path, name, f'"""{PROSE}"""')
    assert _texts(tmp_path) == [PROSE.strip()]


@pytest.mark.parametrize(
    "source",
    [
        b'"""' + PROSE.encode() + b'\xff"""',  # not UTF-8
        b'"""' + PROSE.encode() + b'\x00"""',
        f'"""{PROSE}"""\nprint "Python 2"',
        f'"""{PROSE}',
        f'# This file was auto-generated, do not edit.\n"""{PROSE}"""',
        '"""Too short."""',
        '"""' + "x[0, 1:2] = {'a': (3.14, -2)}\n" * 20 + '"""',
    ],
)
def test_docstring_corpus_passes_over_files_without_usable_prose(
    tmp_path: Path, source: str | bytes
):
    _write(tmp_path, "good.py", f'"""{PROSE.format("the good file")}"""')
    _write(tmp_path, "bad.py", source)
    assert _texts(tmp_path) == [PROSE.format("the good file").strip()]


@pytest.mark.parametrize("name", ["tests/a.py", "pkg/test/a.py", "test_a.py", "a.txt"])
def test_docstring_corpus_passes_over_tests_and_other_files(tmp_path: Path, name: str):
    _write(tmp_path, "good.py", f'"""{PROSE.format("the good file")}"""')
    _write(tmp_path, name, f'"""{PROSE}"""')
    assert _texts(tmp_path) == [PROSE.format("the good file").strip()]


def test_docstring_corpus_splits_long_documents(tmp_path: Path):
    functions = (f'def f{i}():\n    """{PROSE.format(i)}"""\n' for i in range(20))
    _write(tmp_path, "module.py", "\n".join(functions))
    texts = _texts(tmp_path, max_characters=1000)
    assert sum(text.count("nobody") for text in texts) == 80
    assert max(map(len, texts)) <= 1000


def test_docstring_corpus_has_disjoint_splits_that_cover_everything(packages: Path):
    train, test = (
        set(docstring_corpus(split, roots=[packages], min_total_characters=0)["text"])
        for split in ("train", "test")
    )
    assert len(train) + len(test) == len(train | test) == 200
    assert 1 <= len(test) <= 30


def test_docstring_corpus_splits_by_the_path_within_the_root(
    packages: Path, tmp_path: Path
):
    test = docstring_corpus("test", roots=[packages], min_total_characters=0)["text"]
    moved = packages.rename(tmp_path.with_name("elsewhere"))
    assert (
        docstring_corpus("test", roots=[moved], min_total_characters=0)["text"] == test
    )


def test_docstring_corpus_is_shuffled_by_the_seed_alone(packages: Path):
    def order(**settings: int) -> list[str]:
        corpus = docstring_corpus(
            "train", roots=[packages], min_total_characters=0, **settings
        )
        return list(corpus["text"])

    assert order() == order()
    assert order() != order(seed=1)
    assert sorted(order()) == sorted(order(seed=1))
    assert order(max_documents=7) == order()[:7]


def test_docstring_corpus_complains_when_there_is_too_little_text(packages: Path):
    with pytest.raises(RuntimeError, match="Found only .* characters of docstrings"):
        docstring_corpus("train", roots=[packages])


def test_docstring_corpus_rejects_an_unknown_split(packages: Path):
    with pytest.raises(ValueError, match="'validation'"):
        docstring_corpus("validation", roots=[packages])  # type: ignore[arg-type]

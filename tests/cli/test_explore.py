"""``sae-lens-scale explore``: the page, and what is refused before it is made."""

from pathlib import Path

import pytest
from analysis.page.reading import read
from cli.runs import Run, one_architecture


@one_architecture
def test_the_page_of_an_SAE_is_written_whole(run: Run, trained: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    command = f"explore {trained / 'sae'} --output {page} --tokens 300 --prompt apples"
    printed = run(command)
    assert printed.out.startswith(f"{page}, 0.")
    assert "reading 1 batches of 10 passages of 32 tokens" in printed.err
    assert list(tmp_path.iterdir()) == [page]
    facts, arrays = read(page.read_text(encoding="utf-8"))
    assert facts["num_experts"] == 4
    assert facts["num_prompts"] == 1
    assert facts["hook_name"] == "model.layers.0"
    assert arrays["lengths"].tolist()[1:] == [32] * 10
    # SmolLM2's BOS, of which every passage has one.
    assert any(facts["strings"][i] == "<|im_start|>" for i in facts["excluded"])


@one_architecture
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--output {folder}", "--output: {folder} is a folder"),
        ("--output {folder}/no/page.html", "--output: {folder}/no is no folder"),
        ("--context_size 1000", "--context_size must be at most the 128"),
        ("--context_size 1", "--context_size must be at least 3"),
    ],
)
def test_wrong_settings_are_refused_before_the_page_is_made(
    run: Run, trained: Path, tmp_path: Path, options: str, message: str
):
    options = options.format(folder=tmp_path)
    error = run(f"explore {trained / 'sae'} --output {tmp_path}/page.html {options}", 1)
    assert message.format(folder=tmp_path) in error.err
    assert not error.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", ["--tokens 0", "--tokens many", "--dataset a b"])
def test_wrong_usage_exits_with_2(run: Run, untrained: Path, options: str):
    run(f"explore {untrained} {options}", 2)


def test_what_the_metadata_do_not_say_is_asked_for(run: Run, untrained: Path):
    assert "--dataset is needed" in run(f"explore {untrained}", 1).err

"""Fixtures: groups of 2, 3 and 4 gloo processes, each made once for a file."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli.runs import train_command
from distributed.processes import Processes

from sae_lens_scale.cli import main


@pytest.fixture(scope="module")
def processes() -> Iterator[Callable[[int], Processes]]:
    """Processes of a group of a size."""
    made: dict[int, Processes] = {}

    def of_size(size: int) -> Processes:
        if size not in made:
            made[size] = Processes(size)
        return made[size]

    yield of_size
    for group in made.values():
        group.close()


@pytest.fixture(scope="session")
def trained_on_one(
    tiny_llama: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of the results of ``train`` on one process: ``sae`` and ``checkpoints``."""
    output = tmp_path_factory.mktemp("one")
    command = train_command("scale", tiny_llama, text_folder, output)
    assert main(command.split()) == 0
    return output

"""Fixtures: groups of 2, 3 and 4 gloo processes, each made once."""

from collections.abc import Callable, Iterator

import pytest
from distributed.processes import Processes


@pytest.fixture(scope="session")
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

"""Groups of gloo processes for tests."""

import io
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)


def _work(
    rank: int, size: int, timeout: timedelta, folder: str, results: Any, tasks: Any
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
    }
    # A port that is free now need not be when a process listens there.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timeout,
    )
    while (task := tasks.get()) is not None:
        function, arguments = pickle.loads(task)
        try:
            outcome = True, function(*arguments)
        except BaseException:
            outcome = False, traceback.format_exc()
        buffer = io.BytesIO()
        # By value: a tensor's memory may be gone when it is read.
        torch.save(outcome, buffer)
        results.put((rank, buffer.getvalue()))
    dist.destroy_process_group()


class Processes:
    """Processes of one group that run functions of tests, one after the other."""

    def __init__(self, size: int, timeout: timedelta = TIMEOUT):
        # A server imports everything once, and forks all processes.
        context = mp.get_context("forkserver")
        self._folder = TemporaryDirectory()
        # Python 3.11 passes over modules that are found by pytest's path alone.
        context.set_forkserver_preload(
            ["sae_lens_scale.distributed.runner", "distributed.runners"]
        )
        self._results = context.SimpleQueue()
        self._tasks = [context.SimpleQueue() for _ in range(size)]
        self._processes = [
            context.Process(
                target=_work,
                args=(r, size, timeout, self._folder.name, self._results, tasks),
                daemon=True,
            )
            for r, tasks in enumerate(self._tasks)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a function of a module on all processes; its results by rank."""
        for tasks in self._tasks:
            tasks.put(pickle.dumps((function, arguments)))
        outcomes = {}
        for _ in self._tasks:
            while self._results.empty():
                dead = [p.exitcode for p in self._processes if not p.is_alive()]
                assert not dead, f"processes died: {dead}"
                time.sleep(0.01)
            rank, buffer = self._results.get()
            outcomes[rank] = torch.load(io.BytesIO(buffer), weights_only=False)
        failures = [text for succeeded, text in outcomes.values() if not succeeded]
        if failures:
            raise RuntimeError("\n".join(failures))
        return [outcomes[rank][1] for rank in range(len(self._tasks))]

    def close(self) -> None:
        for tasks in self._tasks:
            tasks.put(None)
        for process in self._processes:
            process.join(20)
            process.kill()
        self._folder.cleanup()

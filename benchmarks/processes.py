"""Parts of a benchmark, each in a process of its own, and the record of what they found."""

import gc
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext, SpawnContext
from typing import Any

import torch
from tqdm.auto import tqdm

# Name of a measurement, and the function that returns its record, of values that JSON has.
Item = tuple[str, Callable[[], dict[str, Any]]]


@dataclass(frozen=True)
class Part:
    """
    Measurements that share a process.

    Attributes:
        name: Its name in the record.
        items: The measurements, in order; called in the process.
        seconds: Seconds after which the process is ended.
    """

    name: str
    items: Callable[[Any], Iterable[Item]]
    seconds: float


@dataclass
class Record:
    """
    Results so far.

    Attributes:
        results: Record of each item, by part and name; one that failed has an "error".
        complete: Parts of which nothing is missing.
        save: Called after each change.
    """

    results: dict[str, dict[str, Any]]
    complete: list[str]
    save: Callable[[], None]

    def add(self, part: str, item: str, result: dict[str, Any]) -> None:
        self.results.setdefault(part, {})[item] = result
        self.save()

    def finish(self, part: str) -> None:
        self.complete.append(part)
        self.save()


@dataclass
class _Worker:
    """A part that runs."""

    part: Part
    process: Any
    pipe: Connection
    ends_at: float
    item: str | None = None
    measured: bool = False


def run_together(
    parts: Sequence[Part],
    args: Any,
    record: Record,
    context: ForkContext | SpawnContext,
    deadline: float,
    bar: "tqdm[Any]",
) -> None:
    """
    Run parts at the same time, without those items that the record has.

    A process that dies, as after an illegal access to memory, which no process survives on a
    GPU, costs the item that it was at: another one goes on with the next.

    Args:
        parts: The parts.
        args: Settings, which their measurements are made from.
        record: Record to add to.
        context: How processes are started.
        deadline: Value of time.monotonic() at which all are ended.
        bar: Progress, by parts.
    """
    workers = [_start(part, args, record, context, deadline) for part in parts]
    try:
        while workers:
            soonest = min(worker.ends_at for worker in workers)
            wait(
                [worker.pipe for worker in workers], max(0, soonest - time.monotonic())
            )
            for worker in list(workers):
                if worker.pipe.poll():
                    over = _receive(worker, record, bar)
                elif over := time.monotonic() > worker.ends_at:
                    _end(worker, record, cut=worker.ends_at < deadline)
                if not over:
                    continue
                workers.remove(worker)
                _stop(worker)
                is_unfinished = worker.part.name not in record.complete
                if is_unfinished and time.monotonic() < worker.ends_at:
                    again = _start(worker.part, args, record, context, worker.ends_at)
                    workers.append(again)
                else:
                    bar.update()
    finally:
        for worker in workers:
            _stop(worker)


def _start(
    part: Part,
    args: Any,
    record: Record,
    context: ForkContext | SpawnContext,
    deadline: float,
) -> _Worker:
    receiver, sender = context.Pipe(duplex=False)
    done = frozenset(record.results.get(part.name, {}))
    process = context.Process(
        target=_work, args=(part.items, args, done, sender), daemon=True
    )
    process.start()
    # The process has the only other end then: when it dies, the pipe ends.
    sender.close()
    ends_at = min(time.monotonic() + part.seconds, deadline)
    return _Worker(part, process, receiver, ends_at)


def _work(
    items: Callable[[Any], Iterable[Item]],
    args: Any,
    done: Collection[str],
    pipe: Connection,
) -> None:
    for name, measure in items(args):
        if name in done:
            continue
        pipe.send((name, None))
        start = time.perf_counter()
        try:
            result = measure()
        except Exception as error:
            traceback.print_exc()
            (line, *_) = str(error).splitlines() or [""]
            result = {"error": f"{type(error).__name__}: {line}"}
        pipe.send((name, {**result, "seconds": time.perf_counter() - start}))
        gc.collect()
        if torch.cuda.is_initialized():
            # After an illegal access this raises, and ends the process.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    pipe.send((None, None))


def _receive(worker: _Worker, record: Record, bar: "tqdm[Any]") -> bool:
    """Take one message; returns whether it was the last."""
    part = worker.part.name
    try:
        item, result = worker.pipe.recv()
    except EOFError:
        worker.process.join()
        error = f"the process ended with exit code {worker.process.exitcode}"
        if worker.item or not worker.measured:
            record.add(part, worker.item or "start", {"error": error})
        if not (worker.item or worker.measured):
            # It would end so again.
            record.finish(part)
        return True
    if item is None:
        record.finish(part)
        return True
    if result is None:
        worker.item = item
        bar.set_postfix_str(f"{part}: {item}")
        return False
    worker.item, worker.measured = None, True
    record.add(part, item, result)
    return False


def _end(worker: _Worker, record: Record, cut: bool) -> None:
    """Record what a part was at when its own time was over."""
    if cut and worker.item:
        error = f"not done when the part's {worker.part.seconds:.0f} s were over"
        record.add(worker.part.name, worker.item, {"error": error})


def _stop(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()

"""Training of many SAEs on the same activations, with a record of each."""

import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tqdm.auto import tqdm

from .activations import ActivationCache, CacheSettings
from .measures import variance
from .records import RunRecord, held_out_variances, read, read_records, require_one_text
from .settings import RunSettings
from .training import finished_record, train_run

_Report = Callable[[str, RunRecord | BaseException], None]


def run_grid(
    runs: Sequence[RunSettings],
    cache: ActivationCache,
    output: str | Path,
    *,
    workers: int = 1,
    threads: int | None = None,
    device: str = "cpu",
    keep_weights: bool = False,
) -> list[RunRecord]:
    """
    Train all runs that have no record yet.

    Args:
        cache: The activations; on disk if there are several workers.
        output: Folder of the records.
        workers: Processes that train at the same time. Two of one thread are faster than
            one of two on a machine with two cores.
        threads: Threads of each; by default the cores are shared out.
        keep_weights: Keep the SAEs, each in a folder beside its record.

    Returns:
        The records of all runs.

    Raises:
        RuntimeError: At the end, if runs failed; the others are done.
        ValueError: If the folder's records are of other activations than these.
    """
    settings = {run.name: run for run in runs}
    missing = [
        run for run in settings.values() if finished_record(run, cache, output) is None
    ]
    if missing:
        _require_the_text_of(output, cache)
    if keep_weights:
        finished = set(settings) - {run.name for run in missing}
        without = sorted(n for n in finished if not Path(output, n).is_dir())
        if without:
            tqdm.write(
                f"{len(without)} runs were trained without keeping their weights; to train "
                f"them again, move their records away: {', '.join(without)}",
                file=sys.stderr,
            )
    threads = threads or max(1, (os.cpu_count() or 1) // workers)
    common = {"device": device, "workers": workers, "keep_weights": keep_weights}
    failed: list[str] = []
    with tqdm(
        total=len(settings), initial=len(settings) - len(missing), unit="run"
    ) as bar:

        def report(name: str, outcome: RunRecord | BaseException) -> None:
            bar.update()
            if isinstance(outcome, RunRecord):
                fvu = outcome.in_domain["fvu"]
                bar.write(f"{name}: fvu {fvu:.4f}", file=sys.stderr)
            elif isinstance(outcome, Exception):
                # The other runs go on.
                failed.append(f"{name} ({type(outcome).__name__}: {outcome})")
                bar.write(f"failed: {failed[-1]}", file=sys.stderr)
            else:
                raise outcome

        train = _train_here if workers == 1 else _train_in_processes
        train(missing, cache, output, threads, common, report)
    if failed:
        raise RuntimeError(f"{len(failed)} runs failed: {'; '.join(failed)}")
    records = (finished_record(run, cache, output) for run in settings.values())
    return [record for record in records if record is not None]


def _require_the_text_of(output: str | Path, cache: ActivationCache) -> None:
    # The same settings can stand for other tokens, because installed packages change; and
    # SAEs that trained on more of a text are not to be compared either.
    if not Path(output).is_dir():
        return
    texts = (cache.describe() or {}).get("texts")
    for record in read_records(output):
        known = (record.cache or {}).get("texts") or {}
        # Of texts that one of them has not, nothing can be said.
        if any((texts or {}).get(name, text) != text for name, text in known.items()):
            raise ValueError(
                f"{Path(output, record.name)}.json is of other tokens ({known}) than the "
                f"activations ({texts}): use another folder"
            )
    # Records that do not name their texts can be told by nothing else.
    found = held_out_variances(read(output))
    require_one_text([*found, variance(cache.in_domain)], output)


def _train_here(
    runs: Sequence[RunSettings],
    cache: ActivationCache,
    output: str | Path,
    threads: int,
    common: dict[str, Any],
    report: _Report,
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cache = cache if common["device"] == "cpu" else cache.to(common["device"])
        for run in runs:
            try:
                outcome = train_run(run, cache, output, **common)
            except Exception as error:
                outcome = error
            report(run.name, outcome)
    finally:
        torch.set_num_threads(before)


def _train_in_processes(
    runs: Sequence[RunSettings],
    cache: ActivationCache,
    output: str | Path,
    threads: int,
    common: dict[str, Any],
    report: _Report,
) -> None:
    if cache.folder is None or cache.settings is None:
        raise ValueError("workers must be 1 for activations that are not on disk")
    others = set(multiprocessing.active_children())
    environment = {
        # Progress bars of several processes would overwrite each other.
        "TQDM_DISABLE": "1",
        "OMP_NUM_THREADS": str(threads),
        # Threads that spin while they wait would take the cores from other workers.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    with patch.dict(os.environ, environment):
        executor = ProcessPoolExecutor(
            common["workers"],
            multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(threads,),
        )
        try:
            futures = {
                executor.submit(
                    _train_in_worker, run, cache.folder, cache.settings, output, common
                ): run.name
                for run in runs
            }
            for future in as_completed(futures):
                report(futures[future], future.exception() or future.result())
        except BaseException:
            # The other workers still train.
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise
        finally:
            executor.shutdown(cancel_futures=True)


def _start_worker(threads: int) -> None:
    # Ctrl-C reaches all processes; the parent stops the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)


_open_cache = functools.cache(ActivationCache.open)


def _train_in_worker(
    run: RunSettings,
    folder: Path,
    cache_settings: CacheSettings,
    output: str | Path,
    common: dict[str, Any],
) -> RunRecord:
    return train_run(run, _open_cache(folder, cache_settings), output, **common)

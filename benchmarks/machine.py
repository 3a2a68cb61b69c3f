"""Tools of the benchmarks: a stopwatch, interleaved rounds, memory, a machine's record."""

import gc
import json
import mmap
import os
import platform
import subprocess
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm.auto import tqdm

from sae_lens_scale.files import dump_json, write_whole

VERSIONS = ("torch", "triton", "sae-lens", "sae-lens-scale", "eai-sparsify")

# c10's number of the device.
_CPU = 0

# Errors of an SAE that is not installed, or cannot do a dtype or a device.
UNAVAILABLE = (ImportError, NotImplementedError, RuntimeError)


class Stopwatch:
    """
    Wall and CPU seconds between laps, starting now.

    On a GPU laps are events on its stream: laps cost no synchronisation, which would keep
    the CPU from running ahead. Only the start and :meth:`read` wait for it.
    """

    def __init__(self, device: str):
        self.on_gpu = torch.device(device).type == "cuda"
        self.names: list[str] = []
        self.marks: list[tuple[Any, float]] = []
        if self.on_gpu:
            torch.cuda.synchronize(device)
        self._mark()

    def _mark(self) -> None:
        if self.on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((now, time.process_time()))

    def lap(self, name: str) -> None:
        """End a lap."""
        self.names.append(name)
        self._mark()

    def read(self) -> dict[str, tuple[float, float]]:
        """Wall and CPU seconds of each lap, by name."""
        if self.on_gpu:
            torch.cuda.synchronize()
        laps = {}
        for i, name in enumerate(self.names):
            (start, cpu_start), (end, cpu_end) = self.marks[i : i + 2]
            wall = start.elapsed_time(end) / 1e3 if self.on_gpu else end - start
            laps[name] = (wall, cpu_end - cpu_start)
        return laps


Run = Callable[[Stopwatch], None]


def interleave(
    starts: dict[str, Callable[[], Run]],
    rounds: int,
    device: str,
    label: str,
    optional: Iterable[str] = (),
    errors: type[Exception] | tuple[type[Exception], ...] = UNAVAILABLE,
) -> dict[str, dict[str, Any]]:
    """
    Time everything once in every round, so that a drift is the same for all.

    Args:
        starts: Makers of the timed runs by name; one untimed run of each is the warm-up.
        rounds: Number of timed rounds.
        device: Device that they run on.
        label: Text of the progress bar.
        optional: Names of those that may be unavailable.
        errors: Errors by which they say so.

    Returns:
        By name, either ``laps``, a list of wall and of CPU seconds for each of them, or
        ``missing``, the reason.
    """
    runs: dict[str, Run] = {}
    records: dict[str, dict[str, Any]] = {name: {} for name in starts}
    with tqdm(total=(rounds + 1) * len(starts), desc=label) as bar:
        for name, start in starts.items():
            try:
                runs[name] = start()
                runs[name](Stopwatch(device))
            except errors as error:
                if name not in optional:
                    raise
                runs.pop(name, None)
                records[name]["missing"] = f"{type(error).__name__}: {error}"
            bar.update()
        for _ in range(rounds):
            for name in runs:
                _time(runs[name], device, records[name])
                bar.update()
    runs.clear()
    # Hook points hold their modules in cycles.
    gc.collect()
    return records


def _time(run: Run, device: str, record: dict[str, Any]) -> None:
    watch = Stopwatch(device)
    before = 0
    if watch.on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    run(watch)
    for name, (wall, cpu) in watch.read().items():
        lap = record.setdefault("laps", {}).setdefault(name, {"wall": [], "cpu": []})
        lap["wall"].append(wall)
        lap["cpu"].append(cpu)
    if watch.on_gpu:
        peak = torch.cuda.max_memory_allocated(device) - before
        record["max_memory_allocated"] = max(
            peak, record.get("max_memory_allocated", 0)
        )


def summary(laps: dict[str, Any], *names: str) -> dict[str, float]:
    """Median and minimum of the wall time of laps together, and median of their CPU time."""
    wall, cpu = (
        [sum(lap) for lap in zip(*(laps[name][clock] for name in names), strict=True)]
        for clock in ("wall", "cpu")
    )
    return {"median": median(wall), "min": min(wall), "cpu_median": median(cpu)}


def torch_allocations(run: Callable[[], object]) -> list[tuple[int, int]]:
    """
    List the allocations and releases of torch on the CPU in a run, in operators too.

    Its profiler hears of every allocation of torch's allocators; watching tensors from
    Python would miss an operator's own temporaries. Scratch memory of BLAS libraries is
    not torch's.

    Returns:
        Address and bytes in order of time; bytes are negative where memory is freed.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [event for event in events if event["name"] == "[memory]"]
    memory = [event for event in memory if event["args"]["Device Type"] == _CPU]
    memory.sort(key=lambda event: event["ts"])
    return [(event["args"]["Addr"], event["args"]["Bytes"]) for event in memory]


def peak_bytes(events: Sequence[tuple[int, int]], not_counted: set[int]) -> int:
    """Peak of the allocated bytes, without allocations that stay at some addresses."""
    last = {address: i for i, (address, size) in enumerate(events) if size > 0}
    live: dict[int, int] = {}
    now = peak = 0
    for i, (address, size) in enumerate(events):
        if size < 0:
            now -= live.pop(address, 0)
        elif not (address in not_counted and last[address] == i):
            live[address] = size
            now += size
            peak = max(peak, now)
    return peak


def python_peak_bytes(run: Callable[[], object]) -> int:
    """Peak of the bytes that a run allocates outside torch, in NumPy's arrays above all."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        run()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def peak_rss(run: Callable[[], object]) -> tuple[int, int] | None:
    """Resident bytes before a run, and their peak during it; None except on Linux."""
    try:
        # Sets the high-water mark to the bytes that are resident now.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _proc("/proc/self/status", "VmHWM")
    run()
    return before, _proc("/proc/self/status", "VmHWM")


def available_memory(device: str) -> int:
    """Number of bytes that can be allocated."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if Path("/proc/meminfo").exists():
        return _proc("/proc/meminfo", "MemAvailable")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _proc(path: str, field: str) -> int:
    lines = Path(path).read_text().splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kibibytes) * 1024


def context(device: str) -> dict[str, Any]:
    """The machine, the date and the versions that a measurement depends on."""
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # Above the number of threads if other processes were busy, too.
        "load_average": os.getloadavg(),
        "transparent_huge_pages": huge_pages.read_text().strip()
        if huge_pages.exists()
        else None,
        "commit": _commit(),
        "versions": {name: _version(name) for name in VERSIONS},
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record["gpu"] = properties.name
        record["capability"] = f"{properties.major}.{properties.minor}"
        record["multiprocessors"] = properties.multi_processor_count
        record["gpu_memory"] = properties.total_memory
        record["cuda"] = torch.version.cuda
        record["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    return record


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """The commit that is measured, "-dirty" where code differs from it; None outside of git."""
    commit = _output("git", "describe", "--always")
    changed = _output("git", "status", "--porcelain", "--", ":(top)*.py")
    return f"{commit}-dirty" if commit and changed else commit


def _output(*command: str) -> str | None:
    """First line that a command prints; None if it prints none, or is not installed."""
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0] or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def ceilings(
    device: str, rounds: int, side: int, nbytes: int
) -> dict[str, dict[str, Any]]:
    """
    Measure the ceilings of the machine: matrix products, and writing memory.

    Args:
        device: Device to measure.
        rounds: Number of timed rounds.
        side: Rows and columns of the matrices.
        nbytes: Size of the buffers; larger than caches.

    Returns:
        Laps of each measurement by name; ``per_second`` is in FLOP or bytes (a copy
        counts those that are read and those that are written), and ``page_fault`` is the
        cost of the first write to a page of fresh memory, in seconds.
    """
    buffer, other = (
        torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2)
    )

    def matmul(dtype: torch.dtype) -> Callable[[], object]:
        a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
        return lambda: torch.mm(a, b, out=out)

    def tf32_matmul() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        in_float32()
        torch.set_float32_matmul_precision(before)

    in_float32 = matmul(torch.float32)

    work: dict[str, tuple[int, Callable[[], object]]] = {
        "float32 matmul": (2 * side**3, in_float32),
        "bfloat16 matmul": (2 * side**3, matmul(torch.bfloat16)),
        "copy": (2 * nbytes, lambda: buffer.copy_(other)),
        "fill, reused memory": (nbytes, buffer.zero_),
        "fill, fresh memory": (nbytes, lambda: torch.empty_like(buffer).zero_()),
    }

    def start(run: Callable[[], object]) -> Run:
        def timed(watch: Stopwatch) -> None:
            run()
            watch.lap("run")

        return timed

    if torch.device(device).type == "cuda":
        work["tf32 matmul"] = (2 * side**3, tf32_matmul)
    starts = {name: lambda run=run: start(run) for name, (_, run) in work.items()}
    records = interleave(starts, rounds, device, "machine")
    for name, record in records.items():
        seconds = summary(record["laps"], "run")["median"]
        record["per_second"] = work[name][0] / seconds
    if torch.device(device).type == "cpu":
        fresh, reused = (
            summary(records[f"fill, {which} memory"]["laps"], "run")["median"]
            for which in ("fresh", "reused")
        )
        pages = nbytes / mmap.PAGESIZE
        records["fill, fresh memory"]["page_fault"] = (fresh - reused) / pages
    return records


def read_json(path: Path) -> dict[str, Any]:
    """Read a file's record; an empty one if there is no file."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path: Path, record: Any) -> None:
    """Write a record, whole: if the writing is stopped, the old file stays."""
    write_whole(path, dump_json(record) + "\n")


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Format a table; the first row's keys are its head."""
    head = list(rows[0])
    lines = [
        head,
        ["---"] * len(head),
        *([row.get(h, "-") for h in head] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

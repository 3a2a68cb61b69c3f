"""
Records of training runs: one JSON file a run where a grid works, tables where they are published.

A grid writes each record whole as soon as its run is finished, so that an interruption costs the
runs that were under way and no other. :func:`write_tables` makes tables of such a folder;
:func:`read` and :func:`read_curves` take either.
"""

import csv
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sae_lens_scale.files import dump_json, replacing_files, write_whole

from .columns import COLUMNS

RUNS_FILE, CURVES_FILE, LISTS_FILE = "runs.csv", "curves.csv", "lists.jsonl"
_WORDS = {"": None, "True": True, "False": False}
_PATHS = {column.name: column.path for column in COLUMNS}
_VERSIONS = ("torch", "sae-lens", "transformer-lens", "sae-lens-scale")


@dataclass
class RunRecord:
    """
    One SAE: how it was trained, and what was measured.

    Attributes:
        name: Name of the record's file and of the folder of the weights.
        label: The architecture for people, such as "Scale 64/2".
        sae_cfg: The SAE's whole training config.
        cache: Settings of the activations, and hashes of their texts; None if they were not
            cached.
        environment: Machine, date and versions; ``workers`` runs shared the machine, each
            with ``threads`` threads.
        seconds: Wall time of ``initialization`` and of ``training`` (which contains the
            former, and no evaluation), ``training_cpu`` of all threads, and ``total``.
        curve: The SAE on a sample of held-out tokens while it was trained: ``tokens`` so
            far, ``seconds`` and ``cpu_seconds`` of training, ``mse`` and ``fvu``.
        in_domain: Measurements on held-out text: ``mse`` (squared error summed over d_in,
            mean over tokens), ``fvu`` (share of variance left unexplained),
            ``explained_variance`` (1 - fvu), ``l0``, ``alive`` (share of latents that fired),
            ``tokens`` (their number).
        other_domain: The same on text of another domain.
        unseen_text: The same on a third text, of which no setting was chosen.
        dead: Share of latents that had not fired for long when training ended.
        measures: Further results, by name.
    """

    name: str
    label: str
    settings: dict[str, Any]
    sae_cfg: dict[str, Any]
    cache: dict[str, Any] | None
    environment: dict[str, Any]
    seconds: dict[str, float]
    curve: list[dict[str, float]]
    in_domain: dict[str, Any]
    other_domain: dict[str, Any] | None
    dead: float
    measures: dict[str, Any]
    unseen_text: dict[str, Any] | None = None

    def write(self, folder: str | Path) -> Path:
        """Write the record, whole or not at all, into a folder that is made if it is missing."""
        path = Path(folder, f"{self.name}.json")
        write_whole(path, dump_json(asdict(self)) + "\n")
        return path

    @classmethod
    def read(cls, path: str | Path) -> "RunRecord":
        """Read a record; ValueError if the file holds none."""
        try:
            return cls(**json.loads(Path(path).read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is no record of a run: {error}") from error


def read_records(folder: str | Path) -> list[RunRecord]:
    """Read the records of a folder by name; FileNotFoundError if there is no such folder."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    return [RunRecord.read(path) for path in sorted(Path(folder).glob("*.json"))]


def read(folder: str | Path, names: Sequence[str] | None = None) -> pd.DataFrame:
    """
    Read the runs of a folder of records, or of the tables made of them, one row a run.

    Args:
        names: Names of the runs to read; all by default.

    Returns:
        Columns named by path, such as ``settings.lr``, ``sae_cfg.k`` and
        ``measures.redundancy.share_above``, with lists in single cells; and, by their short
        names, those that figures are drawn of: ``label``, ``seed``, ``k`` (for an SAE
        without one the mean L0 of its seeds), ``mse``, ``mse_other_domain``, …. Cells that do
        not apply to a run are empty.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    if Path(folder, RUNS_FILE).exists():
        frame = _read_csv(Path(folder, RUNS_FILE))
        lines = Path(folder, LISTS_FILE).read_text().splitlines()
        frame = frame.merge(pd.DataFrame(map(json.loads, lines)), "left", on="name")
    else:
        frame = pd.DataFrame(map(_row, read_records(folder)))
    if names is not None and len(frame):
        frame = frame.loc[frame["name"].isin(names)].reset_index(drop=True)
    if frame.empty:
        return frame
    short = {name: frame[path] for name, path in _PATHS.items() if path in frame}
    short["k"] = _active_latents(frame)
    # The copy is in one piece: pandas warns of additions to a frame of many.
    return pd.concat([frame, pd.DataFrame(short)], axis="columns").copy()


def _row(record: RunRecord) -> dict[str, Any]:
    return dict(_cells(asdict(record)))


def _cells(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and values of scalars, and of the lists that have a column."""
    for name, value in values.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _cells(value, f"{path}.")
        elif not isinstance(value, list) or path in _PATHS.values():
            yield path, value


def _read_csv(path: Path) -> pd.DataFrame:
    # Not by pandas, which rounds floats or not, depending on its version.
    with path.open(newline="") as file:
        return pd.DataFrame(
            {name: _value(text) for name, text in row.items()}
            for row in csv.DictReader(file)
        )


def _value(text: str) -> bool | float | str | None:
    if text in _WORDS:
        return _WORDS[text]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def _active_latents(runs: pd.DataFrame) -> Any:
    """k, and for an SAE without one the mean L0 of the runs that differ in their seed only."""
    settings = [
        name
        for name in runs
        if str(name).startswith("settings.") and name != "settings.seed"
    ]
    l0: Any = runs.groupby(settings, dropna=False)["in_domain.l0"].transform("mean")
    return runs["sae_cfg.k"].fillna(l0) if "sae_cfg.k" in runs else l0


def held_out_variances(runs: pd.DataFrame) -> list[float]:
    """
    Recover the variance, summed over d_in, of the activations that each run of :func:`read` was
    measured on, if its error is finite.
    """
    if runs.empty:
        return []
    return [x for x in runs["mse"] / runs["fvu"] if math.isfinite(x)]


def require_one_text(variances: Sequence[float], folder: str | Path) -> None:
    """
    Refuse to compare runs that were measured on different texts.

    A text is known by the variance of its activations, which every record has: a
    necessary condition, not a sufficient one. The same text on another machine or in another
    precision differs by 0.1 %, other documents of its kind by about 1 %.

    Raises:
        ValueError: If they differ by more than 0.3 %.
    """
    if variances and max(variances) > 1.003 * min(variances):
        raise ValueError(
            f"runs in {folder} must be measured on one text, but the variance of "
            f"held-out activations is {min(variances):.6g} in one place and "
            f"{max(variances):.6g} in another (docstrings change with the installed "
            "packages): use a folder for each text"
        )


def read_curves(folder: str | Path) -> pd.DataFrame:
    """
    Read the learning curves of a folder of records, or of the tables made of them, one row a point:
    ``name``, ``label``, ``k``, ``seed`` of the run and ``tokens``, ``seconds``, ``cpu_seconds``,
    ``mse`` and ``fvu``.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    if Path(folder, CURVES_FILE).exists():
        curves = _read_csv(Path(folder, CURVES_FILE))
    else:
        curves = _points(read_records(folder))
    if curves.empty:
        return curves
    runs = read(folder).reindex(columns=["name", "label", "sae_cfg.k", "seed"])
    return curves.merge(runs.rename(columns={"sae_cfg.k": "k"}), on="name")


def _points(records: Sequence[RunRecord]) -> pd.DataFrame:
    return pd.DataFrame(
        {"name": record.name, **point} for record in records for point in record.curve
    )


def write_tables(folder: str | Path, output: str | Path) -> list[Path]:
    """
    Write the records of a folder as tables into another; an error leaves those that were there.

    Returns:
        Paths of ``runs.csv`` with a row for each run, ``curves.csv`` with a row for each point of a
        learning curve, and ``lists.jsonl`` with the lists of :data:`.COLUMNS`, a line for each run.
        Floats are written with all their digits.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no records, or is the folder for the tables, too.
    """
    if Path(output).resolve() == Path(folder).resolve():
        raise ValueError(f"tables must be in another folder than records, got {output}")
    records = read_records(folder)
    if not records:
        raise ValueError(f"{folder} has no records")
    runs, lists = [], []
    for row in map(_row, records):
        of_run = {n: value for n, value in row.items() if isinstance(value, list)}
        lists.append(json.dumps({"name": row["name"], **of_run}, separators=(",", ":")))
        runs.append({n: value for n, value in row.items() if n not in of_run})
    with replacing_files(output) as temporary:
        pd.DataFrame(runs).to_csv(temporary / RUNS_FILE, index=False)
        _points(records).to_csv(temporary / CURVES_FILE, index=False)
        (temporary / LISTS_FILE).write_text("\n".join(lists) + "\n")
    return [Path(output, name) for name in (RUNS_FILE, CURVES_FILE, LISTS_FILE)]


def describe_environment(device: str, workers: int) -> dict[str, Any]:
    """Describe what a run's times depend on: date, machine, threads and versions."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.platform(),
        "cpu": _cpu_model(),
        # CPUs of the same name differ in this, by a factor of two in time.
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "device": device,
        "workers": workers,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _VERSIONS},
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()

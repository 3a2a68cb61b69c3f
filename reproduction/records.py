"""What is known of a training run, on disk and in tables."""

import json
import math
import os
import platform
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import torch

_SHORT = {
    "seed": "settings.seed",
    **{
        name: f"sae_cfg.{name}"
        for name in (
            "d_sae",
            "num_experts",
            "experts_per_token",
            "feature_scaling",
            "decomposition",
            "gate",
        )
    },
    **{name: f"in_domain.{name}" for name in ("mse", "fvu", "l0", "alive")},
    "mse_other_domain": "other_domain.mse",
    "fvu_other_domain": "other_domain.fvu",
    "loss_recovered": "measures.loss_recovered.in_domain.score",
    "loss_recovered_other_domain": "measures.loss_recovered.other_domain.score",
    "redundancy": "measures.redundancy.share_above",
    "redundancy_between_experts": "measures.redundancy.between_experts",
    "activation_similarity": "measures.activation_similarity.similarity",
    "expert_counts": "measures.expert_usage.counts",
    "overlap_histogram": "measures.overlap_histogram.pairs",
    "intra_expert_similarity": "measures.expert_similarity.intra.mean_cosine",
    "inter_expert_similarity": "measures.expert_similarity.inter.mean_cosine",
    "scaling_factors": "measures.scaling_factors",
}
_VERSIONS = ("torch", "sae-lens", "transformer-lens", "sae-lens-scale")


@dataclass
class RunRecord:
    """
    One SAE: how it was trained, and what was measured.

    Attributes:
        name: Name of the record's file and of the folder of the weights.
        label: The architecture for people, such as "scale 64/2".
        settings: The run's settings.
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
            ``explained_variance`` (1 - fvu), ``l0``, ``alive`` (share of latents that fired).
        other_domain: The same on text of another domain.
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

    def write(self, folder: str | Path) -> Path:
        """
        Write the record, whole or not at all.

        Args:
            folder: Folder of the records, made if it is missing.

        Returns:
            Path of the file.
        """
        path = Path(folder, f"{self.name}.json")
        write_whole(path, dump_json(asdict(self)) + "\n")
        return path

    @classmethod
    def read(cls, path: str | Path) -> "RunRecord":
        """
        Read a record.

        Args:
            path: Its file.

        Returns:
            The record.

        Raises:
            ValueError: If the file holds no record.
        """
        try:
            return cls(**json.loads(Path(path).read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is no record of a run: {error}") from error


def read_records(folder: str | Path) -> list[RunRecord]:
    """
    Read all records of a folder.

    Args:
        folder: Folder of the records.

    Returns:
        Records in the order of their names.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    return [RunRecord.read(path) for path in sorted(Path(folder).glob("*.json"))]


def read(folder: str | Path, names: Sequence[str] | None = None) -> pd.DataFrame:
    """
    Read the records of a folder into a table, one row a run.

    Args:
        folder: Folder of the records.
        names: Names of the records to read; all by default.

    Returns:
        Columns named by path, such as ``settings.lr``, ``sae_cfg.k`` and
        ``measures.redundancy.share_above``, with lists in single cells; and, by their short
        names, those that figures are drawn of: ``label``, ``seed``, ``k`` (for an SAE
        without one the mean L0 of its seeds), ``mse``, ``mse_other_domain``, …. What a run
        lacks is empty.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    records = [r for r in read_records(folder) if not names or r.name in names]
    if not records:
        return pd.DataFrame()
    frame = pd.json_normalize(
        [{**asdict(r), "cache": None, "curve": None} for r in records]
    )
    frame = frame.drop(columns=["cache", "curve"])
    short = {name: frame[path] for name, path in _SHORT.items() if path in frame}
    frame = frame.assign(**short)
    # What has no k has the mean L0 of the runs that differ in their seed only.
    l0: dict[str, list[float]] = defaultdict(list)
    keys = [json.dumps({**r.settings, "seed": 0}, sort_keys=True) for r in records]
    for key, record in zip(keys, records, strict=True):
        l0[key].append(record.in_domain["l0"])
    ks = [
        record.sae_cfg.get("k", fmean(l0[key]))
        for key, record in zip(keys, records, strict=True)
    ]
    return frame.assign(k=ks)


def held_out_variances(runs: pd.DataFrame) -> list[float]:
    """
    The variance of the activations that each run was measured on.

    Args:
        runs: What :func:`read` returned.

    Returns:
        Sums over d_in, without the runs that have no finite error.
    """
    if runs.empty:
        return []
    return [x for x in runs["mse"] / runs["fvu"] if math.isfinite(x)]


def require_one_text(variances: Sequence[float], folder: str | Path) -> None:
    """
    Refuse to compare what was measured on texts that differ.

    A text is known by the variance of its activations, which every record has: a
    necessary condition, not a sufficient one.

    Args:
        variances: Of held-out activations. The same text on another machine or in another
            precision differs by 0.1 %, other documents of its kind by about 1 %.
        folder: Folder of the records, for the message.

    Raises:
        ValueError: If they differ by more than 0.3 %.
    """
    if variances and max(variances) > 1.003 * min(variances):
        raise ValueError(
            f"what {folder} compares must be measured on one text, but the variance of "
            f"held-out activations is {min(variances):.6g} in one place and "
            f"{max(variances):.6g} in another (docstrings change with the installed "
            "packages): use a folder for each text"
        )


def read_curves(folder: str | Path) -> pd.DataFrame:
    """
    Read the learning curves of all records of a folder, one row a point.

    Args:
        folder: Folder of the records.

    Returns:
        ``name``, ``label``, ``k``, ``seed`` and the point's ``tokens``, ``seconds``,
        ``cpu_seconds``, ``mse`` and ``fvu``.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    return pd.DataFrame(
        {
            "name": record.name,
            "label": record.label,
            "k": record.sae_cfg.get("k"),
            "seed": record.settings["seed"],
            **point,
        }
        for record in read_records(folder)
        for point in record.curve
    )


def table(
    records: pd.DataFrame,
    values: Sequence[str] = ("fvu", "l0", "alive", "dead"),
    by: Sequence[str] | None = None,
) -> pd.DataFrame:
    """
    Mean and spread over seeds.

    Args:
        records: What :func:`read` returned, or some of its rows.
        values: Columns of numbers to average.
        by: Columns that tell settings apart; all runs that agree in them are averaged. By
            default ``label``, ``k`` and all settings but the seed that differ between runs
            of the same label and k.

    Returns:
        A row for each combination of ``by``; columns ``(value, "mean")`` and
        ``(value, "std")`` (the sample's, NaN for a single run), and ``("runs", "")``.

    Raises:
        ValueError: If a column is missing.
    """
    missing = [name for name in (*values, *(by or ())) if name not in records]
    if missing:
        raise ValueError(f"records must have the columns {missing}")
    if by is None:
        by = ["label", "k", *_varying(records)]
        # Neither dictionaries nor empty cells can be grouped by.
        records = records.assign(**{n: records[n].astype(str) for n in by[2:]})
    groups = records.groupby(list(by), dropna=False)
    columns = {
        (name, statistic): groups[name].agg(statistic)
        for name in values
        for statistic in ("mean", "std")
    }
    return pd.DataFrame({**columns, ("runs", ""): groups.size()})


def _varying(records: pd.DataFrame) -> list[str]:
    settings = [
        name
        for name in records
        if str(name).startswith(("settings.", "sae_cfg."))
        # The config says what these are, defaults included; L0 is the Gated SAE's k.
        and not str(name).startswith("settings.sae.")
        and name not in ("settings.seed", "sae_cfg.l1_coefficient")
    ]
    groups = records[settings].astype(str).groupby([records["label"], records["k"]])
    most = groups.nunique().to_numpy().max(axis=0, initial=0)
    return [name for name, n in zip(settings, most, strict=True) if n > 1]


def format_table(averages: pd.DataFrame, digits: int = 4) -> str:
    """
    A table of means and spreads as text.

    Args:
        averages: What :func:`table` returned.
        digits: Digits after the point.

    Returns:
        Text, a line for each row.
    """

    def cell(mean: float, std: float) -> str:
        spread = "" if math.isnan(std) else f" ± {std:.{digits}f}"
        return f"{mean:.{digits}f}{spread}"

    names = [n for n in averages.columns.get_level_values(0).unique() if n != "runs"]
    text = pd.DataFrame(
        {
            name: list(map(cell, averages[name, "mean"], averages[name, "std"]))
            for name in names
        },
        index=averages.index,
    )
    text["runs"] = averages["runs", ""]
    return text.reset_index().to_string(index=False)


def describe_environment(device: str, workers: int) -> dict[str, Any]:
    """
    What a run's times depend on.

    Args:
        device: Where it ran.
        workers: How many runs shared the machine.

    Returns:
        Date, machine, threads and versions.
    """
    on_gpu = torch.device(device).type == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.platform(),
        "cpu": _cpu_model(),
        # CPUs of one name differ in this, and it halves or doubles times.
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

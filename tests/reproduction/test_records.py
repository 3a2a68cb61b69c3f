"""Records of runs, and tables of them."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd
import pytest

from reproduction.records import (
    RunRecord,
    describe_environment,
    format_table,
    read,
    read_curves,
    read_records,
    table,
)
from sae_lens_scale.files import dump_json


def record(
    label: str, seed: int, fvu: float, k: int | None = 32, **changes: Any
) -> RunRecord:
    sae_cfg: dict[str, Any] = {"d_sae": 64, "gate": "rescaled"}
    if k is not None:
        sae_cfg["k"] = k
    return replace(
        RunRecord(
            name=f"{label.replace('/', '-')}-{k}-{seed}",
            label=label,
            settings={"label": label, "seed": seed, "lr": 1e-3, "lr_factors": {}},
            sae_cfg=sae_cfg,
            cache={"model": "tiny"},
            environment={"cores": 2},
            seconds={"training": 1.0},
            curve=[
                {"tokens": 0, "seconds": 0.0, "fvu": 1.0},
                {"tokens": 64, "seconds": 1.0, "fvu": fvu},
            ],
            in_domain={"fvu": fvu, "mse": 10 * fvu, "l0": 30.0 + seed, "alive": 0.5},
            other_domain=None,
            dead=0.25,
            measures={"redundancy": {"share_above": 0.1}},
        ),
        **changes,
    )


def write(folder: Path, *records: RunRecord) -> Path:
    for each in records:
        each.write(folder)
    return folder


def test_a_record_comes_back_as_it_was_written(tmp_path: Path):
    written = record("Scale 64/2", 0, 0.1)
    path = written.write(tmp_path / "new")
    assert path.name == f"{written.name}.json"
    assert RunRecord.read(path) == written
    assert read_records(tmp_path / "new") == [written]
    diverged = replace(written, in_domain={"fvu": math.nan}, dead=math.inf)
    text = diverged.write(tmp_path).read_text()
    assert json.loads(text)["in_domain"] == {"fvu": None}
    assert dump_json((1, math.inf)) == "[\n 1,\n null\n]"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"name": "x"}', '{"nonsense": 1}'])
def test_what_is_no_record_is_named(text: str, tmp_path: Path):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match="broken.json is no record of a run"):
        read_records(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        read(tmp_path / "nowhere")


def test_a_row_has_paths_and_the_short_names_of_figures(tmp_path: Path):
    folder = write(
        tmp_path,
        record("Scale 64/2", 0, 0.1),
        record("Gated 64", 0, 0.2, k=None),
        record("Gated 64", 1, 0.3, k=None),
    )
    rows = read(folder).set_index("name")
    row = rows.loc["Scale 64-2-32-0"]
    assert (row["settings.lr"], row["sae_cfg.gate"], row["gate"]) == (
        1e-3,
        "rescaled",
        "rescaled",
    )
    assert (row["fvu"], row["mse"], row["in_domain.fvu"]) == (0.1, 1.0, 0.1)
    assert (row["redundancy"], row["seed"], row["k"]) == (0.1, 0, 32)
    # What has no k is drawn at the mean L0 of its seeds.
    gated = rows[rows["label"] == "Gated 64"]
    assert list(gated["k"]) == [30.5, 30.5]
    assert len(read(folder, ["Scale 64-2-32-0"])) == 1
    (tmp_path / "empty").mkdir()
    assert read(tmp_path / "empty").empty


def test_curves_have_a_row_for_each_point(tmp_path: Path):
    write(tmp_path, record("A 1", 0, 0.1), record("A 1", 1, 0.2))
    curves = read_curves(tmp_path)
    assert list(curves["fvu"]) == [1.0, 0.1, 1.0, 0.2]
    assert list(curves["seed"]) == [0, 0, 1, 1]
    assert set(curves["label"]) == {"A 1"}


def test_tables_have_mean_and_spread_over_seeds(tmp_path: Path):
    fvus = [0.1, 0.14, 0.15]
    records = [record("A 1", seed, fvu) for seed, fvu in enumerate(fvus)]
    records += [record("A 1", 0, 0.3, k=8), record("B 2", 0, 0.5)]
    averages = table(read(write(tmp_path, *records)), ["fvu", "dead"])
    assert list(averages.index) == [("A 1", 8), ("A 1", 32), ("B 2", 32)]
    row: Any = averages.loc[("A 1", 32)]
    assert row["fvu", "mean"] == pytest.approx(mean(fvus))
    assert row["fvu", "std"] == pytest.approx(stdev(fvus))
    assert row["runs", ""] == 3
    single: Any = averages.loc[("B 2", 32)]
    assert math.isnan(single["fvu", "std"])
    lines = format_table(averages).splitlines()
    assert lines[0].split() == ["label", "k", "fvu", "dead", "runs"]
    assert lines[2].split()[3:] == [
        "0.1300",
        "±",
        "0.0265",
        "0.2500",
        "±",
        "0.0000",
        "3",
    ]
    assert lines[3].split()[3:] == ["0.5000", "0.2500", "1"]


def test_settings_that_differ_are_not_averaged(tmp_path: Path):
    fast = {"seed": 0, "lr": 2e-3, "lr_factors": {"omega": 2.0}}
    folder = write(
        tmp_path,
        record("A 1", 0, 0.1),
        record("A 1", 1, 0.2),
        record("A 1", 0, 0.4, name="fast", settings=fast),
    )
    averages = table(read(folder), ["fvu"]).reset_index()
    assert list(averages["settings.lr"]) == ["0.001", "0.002"]
    assert list(averages["runs", ""]) == [2, 1]
    assert table(read(folder), ["fvu"], by=["label"])["runs", ""].item() == 3
    with pytest.raises(ValueError, match=r"must have the columns \['nonsense'\]"):
        table(read(folder), ["nonsense"])
    with pytest.raises(ValueError, match="must have the columns"):
        table(pd.DataFrame())


def test_the_environment_says_who_shared_the_machine():
    environment = describe_environment("cpu", 2)
    assert (environment["workers"], environment["device"]) == (2, "cpu")
    assert environment["gpu"] is None
    assert environment["cores"] >= 1
    assert environment["cpu_instructions"]
    assert environment["versions"]["sae-lens"].startswith("6.")
    json.dumps(environment)

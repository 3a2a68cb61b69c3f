"""Records of runs, on disk and as tables."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from reproduction.records import (
    RunRecord,
    describe_environment,
    read,
    read_curves,
    read_records,
    write_tables,
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
    # SAEs without a k are drawn at the mean L0 of their seeds.
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


@pytest.fixture
def varied(tmp_path: Path) -> Path:
    """Records that lack different things."""
    scale = record(
        "Scale 64/2", 0, 1 / 3, measures={"expert_usage": {"counts": [3, 0]}}
    )
    scale.sae_cfg["feature_scaling"] = True
    scale.settings["lr_factors"] = {"W_router": 0.1}
    gated = record("Gated 64", 1, 0.1 + 0.2, k=None)
    gated.measures["expert_similarity"] = {"per_expert": [{"mean_cosine": 0.5}]}
    diverged = record("Switch 32", 0, math.nan, other_domain={"fvu": 0.3}, curve=[])
    return write(tmp_path / "runs", scale, gated, diverged)


def test_tables_say_what_the_records_do(varied: Path, tmp_path: Path):
    paths = write_tables(varied, tmp_path / "tables")
    assert sorted(paths) == sorted((tmp_path / "tables").iterdir())
    for reader in (read, read_curves):
        of_records, of_tables = reader(varied), reader(tmp_path / "tables")
        pd.testing.assert_frame_equal(
            of_tables, of_records, check_exact=True, check_dtype=False, check_like=True
        )
    runs = read(tmp_path / "tables").set_index("name")
    assert runs.loc["Scale 64-2-32-0", "fvu"] == 1 / 3
    assert runs.loc["Scale 64-2-32-0", "expert_counts"] == [3, 0]
    assert runs.loc["Scale 64-2-32-0", "feature_scaling"] is True
    assert len(read(tmp_path / "tables", ["Scale 64-2-32-0"])) == 1
    assert not [name for name in runs if "per_expert" in name]


def test_tables_are_written_all_or_none(
    varied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tables = tmp_path / "tables"
    write_tables(write(tmp_path / "first", record("A 1", 0, 0.1)), tables)
    before = {path.name: path.read_bytes() for path in tables.iterdir()}

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_tables(varied, tables)
    assert {path.name: path.read_bytes() for path in tables.iterdir()} == before


def test_tables_need_records_and_a_folder_of_their_own(varied: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="must be in another folder than records"):
        write_tables(varied, varied)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no records"):
        write_tables(tmp_path / "empty", tmp_path / "tables")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        write_tables(tmp_path / "nowhere", tmp_path / "tables")
    assert not (tmp_path / "tables").exists()


def test_the_environment_says_who_shared_the_machine():
    environment = describe_environment("cpu", 2)
    assert (environment["workers"], environment["device"]) == (2, "cpu")
    assert environment["gpu"] is None
    assert environment["cores"] >= 1
    assert environment["cpu_instructions"]
    assert environment["versions"]["sae-lens"].startswith("6.")
    json.dumps(environment)

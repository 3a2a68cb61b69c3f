"""SAEs on synthetic activations, in a small model of 64 features."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from sae_lens.synthetic import HierarchyConfig

from reproduction import synthetic
from reproduction.__main__ import main
from reproduction.records import read, read_records
from reproduction.synthetic import (
    synthetic_activations,
    synthetic_runs,
    synthetic_table,
)

ROOT = Path(__file__).parents[2]
SMALL = replace(
    synthetic.MODEL,
    num_features=64,
    hidden_dim=32,
    hierarchy=HierarchyConfig(total_root_nodes=2, branching_factor=2, max_depth=2),
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(synthetic, "MODEL", SMALL)
    monkeypatch.setattr(synthetic, "TRAINING_SAMPLES", 4_096)
    monkeypatch.setattr(synthetic, "TEST_SAMPLES", 512)


@pytest.mark.usefixtures("small")
def test_a_command_trains_scores_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["synthetic", "--folder", str(tmp_path), "--only", "recommended"]
    assert main([*command, "--seeds", "3"]) == 0
    first = {record.name: record for record in read_records(tmp_path / "runs")}
    assert len(first) == 2
    for record in first.values():
        scores = record.measures["synthetic"]
        assert scores["model"] == SMALL.to_dict()
        assert 0 < scores["mcc"] <= 1
        # The samples differ, and so do the measures by a little.
        assert scores["fvu"] == pytest.approx(record.in_domain["fvu"], abs=0.1)
    tables = tmp_path / "tables"
    assert main([*command, "--seeds", "3", "4", "--output", str(tables)]) == 0
    records = read_records(tmp_path / "runs")
    assert len(records) == 4
    assert all(first.get(record.name, record) == record for record in records)
    assert len(read(tables).dropna(subset=["recovered"])) == 4
    assert "Scale 4/2 recommended" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--set", "num_experts=3"], "d_sae"),
        (["--documents", "{}/missing.md"], "missing.md"),
        (["--output", "{}/file/tables"], "--output: .*file is no folder"),
    ],
)
def test_mistakes_show_before_anything_is_sampled(
    options: list[str],
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "file").touch()
    options = [option.format(tmp_path) for option in options]
    folder = tmp_path / "synthetic"
    assert main(["synthetic", "--folder", str(folder), *options]) == 1
    assert re.search(complaint, capsys.readouterr().err)
    assert not folder.exists()


@pytest.mark.usefixtures("small")
def test_all_runs_share_their_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, cache = synthetic_activations(tmp_path)
    assert (len(cache.train), len(cache.in_domain)) == (4_096, 512)
    assert model.cfg == SMALL
    again = synthetic_activations(tmp_path)[1]
    assert again.train.sample(9).equal(cache.train.sample(9))
    monkeypatch.setattr(synthetic, "MODEL", replace(SMALL, seed=1))
    with pytest.raises(ValueError, match="another synthetic model: use another folder"):
        synthetic_activations(tmp_path)


@pytest.mark.usefixtures("small")
def test_runs_without_scores_make_no_table(tmp_path: Path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="no records with scores on synthetic data"):
        synthetic_table(tmp_path / "runs")


def test_dense_SAEs_are_trained_as_long_as_mixtures_and_one_is_as_wide():
    runs = {run.label: run for run in synthetic_runs([0])}
    widths = {label: run.sae["d_sae"] for label, run in runs.items()}
    assert widths == {
        "Scale 64/2 recommended": 2_048,
        "Switch 32 recommended": 2_048,
        "TopK 640": 640,
        "TopK 896": 896,
        "Full TopK 2048": 2_048,
    }
    schedules = {(r.training_tokens, r.batch_size, r.sae["k"]) for r in runs.values()}
    assert schedules == {(2_000_000, 1_024, 8)}


def test_the_published_table_is_of_the_published_records():
    page = (ROOT / "docs/score.md").read_text()
    table = re.search(r"<!-- table synthetic -->(.*?)<!-- end -->", page, re.DOTALL)
    assert table
    records = ROOT / "reproduction/results/synthetic"
    assert table[1].strip() == synthetic_table(records)

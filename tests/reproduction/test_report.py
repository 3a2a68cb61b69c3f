"""Tables and figures of an experiment's records."""

import math
from pathlib import Path
from typing import Any

import pytest
from experiment_records import write_records
from matplotlib.figure import Figure

from reproduction.presets import PRESETS
from reproduction.records import RunRecord, read, read_records
from reproduction.report import draw, fill, preset_runs, tables
from sae_lens_scale.cli import main

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Each of one text.
EARLIER, RECORDS = RESULTS / "smollm2-earlier", RESULTS / "smollm2"


def test_preset_runs_leaves_out_what_belongs_to_another_preset(records_folder: Path):
    names = {run.name for run in PRESETS["smollm2"].with_seeds((0, 1))}
    assert set(preset_runs(records_folder, "smollm2")["name"]) == names
    assert len(read(records_folder)) > len(names)


def test_preset_runs_refuses_a_folder_without_records(tmp_path: Path):
    with pytest.raises(ValueError, match="has no records"):
        preset_runs(tmp_path, "smollm2")


def test_records_of_different_texts_are_not_compared(tmp_path: Path):
    write_records(tmp_path, "smollm2", seeds=(0,))
    path = min(tmp_path.glob("*.json"))
    record = RunRecord.read(path)
    record.in_domain["mse"] *= 1.01
    record.write(tmp_path)
    with pytest.raises(ValueError, match="one text.* is 5 in one place and 5.05 in"):
        preset_runs(tmp_path, "smollm2")
    record.in_domain["fvu"] = math.nan
    record.write(tmp_path)
    assert len(preset_runs(tmp_path, "smollm2"))


def test_tables_hold_the_main_grid_and_every_ablation(records_folder: Path):
    found = tables(records_folder, "smollm2")
    main = {"fvu", "comparison", "gap", "gated", "loss-recovered", "redundancy"}
    assert {*main, "flops", "gated-comparison", "comparison-of-ceiling"} <= set(found)
    # 0.1 is added to every error there.
    assert f"{1 - 0.085 / 0.205:.1%}" in found["comparison"]
    assert f"{1 - 0.185 / 0.305:.1%}" in found["comparison-other-domain"]
    assert "Scale 64/16, without scaling" in found["ablation-experts"]
    scaling = found["ablation-scaling"]
    assert "Scale 64/16, double_softmax, without scaling" in scaling
    assert "Scale 64/2, learned" in found["ablation-decompositions"]
    assert "Switch 32, softmax" in found["ablation-gates"]
    assert "Scale 256/8 no k-means" in found["ablation-recipe"]
    assert "Switch 18" in found["ablation-flops"]
    assert "a quarter of the tokens" in found["ablation-time"]
    assert "Switch 18" not in found["fvu"]
    assert "Switch 32 narrow" in found["ablation-redundancy"]
    assert "| 250,000 tokens | 500,000 tokens |" in found["length"]
    assert "lower than Switch 32" in found["length-comparison"]
    assert "25.00%" in found["length-redundancy"]


def test_tables_of_ablations_without_records_are_left_out(tmp_path: Path):
    write_records(tmp_path, "smollm2-decompositions", seeds=(0,))
    found = tables(tmp_path, "smollm2")
    assert "ablation-decompositions" in found
    assert "ablation-gates" not in found


def test_tables_need_no_scale_sae(tmp_path: Path):
    write_records(tmp_path, "smollm2-length", seeds=(0,))
    for path in tmp_path.glob("scale*"):
        path.unlink()
    found = tables(tmp_path, "smollm2")
    assert {"fvu", "length"} <= set(found)
    assert not {"comparison", "length-comparison"} & set(found)


def test_tables_need_no_other_domain(tmp_path: Path):
    write_records(tmp_path, "smollm2", seeds=(0,))
    for path in tmp_path.glob("*.json"):
        record = RunRecord.read(path)
        record.other_domain = None
        record.write(tmp_path)
    found = tables(tmp_path, "smollm2")
    assert "comparison" in found
    assert not {"comparison-other-domain", "fvu-other-domain"} & set(found)


def test_draw_draws_every_figure(records_folder: Path, tmp_path: Path):
    drawn = draw(records_folder, "smollm2", tmp_path / "images")
    assert len(drawn) == 21
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


@pytest.mark.parametrize(
    ("name", "shown", "beside"),
    [
        ("figure-3a", "squared error, sum over d_in", "openwebtext"),
        ("figure-3b", "squared error, sum over d_in, other domain", "hle-biomedical"),
        ("figure-3c", "loss recovered, other domain", "hle-biomedical"),
        ("loss-recovered", "loss recovered", None),
        ("figure-4a", "squared error, sum over d_in", "openwebtext"),
        ("figure-4b", "squared error, sum over d_in, other domain", None),
        ("figure-4d", "loss recovered, other domain", None),
    ],
)
def test_figures_show_the_domain_that_the_papers_numbers_are_of(
    name: str,
    shown: str,
    beside: str | None,
    records_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    figures: list[Figure] = []

    def save(figure: Figure, path: Path, **_: Any) -> None:
        assert path.name == f"{name}.png"
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", save)
    draw(records_folder, "smollm2", tmp_path, [name])
    measured, *paper = (axes for axes in figures[0].axes if axes.lines)
    assert measured.get_ylabel() == shown
    found = [axes.get_title().lower() for axes in paper]
    assert len(found) == (beside is not None)
    assert all(beside is not None and beside in title for title in found)


def test_draw_leaves_out_what_records_do_not_suffice_for(tmp_path: Path):
    write_records(tmp_path / "some", "smollm2-decompositions", seeds=(0,))
    drawn = draw(tmp_path / "some", "smollm2", tmp_path)
    names = {path.stem for path in drawn}
    assert "figure-10" in names
    assert not names & {"figure-3a", "figure-5b", "learning-curves"}
    assert all(path.exists() for path in drawn)
    write_records(tmp_path / "none", "smollm2-recipe", seeds=(0,))
    assert draw(tmp_path / "none", "smollm2", tmp_path) == []


def test_losses_of_different_numbers_of_contexts_are_not_compared(tmp_path: Path):
    write_records(tmp_path, "smollm2-decompositions", seeds=(0,))
    record = RunRecord.read(min(tmp_path.glob("*.json")))
    record.measures["loss_recovered"]["contexts"] = 64
    record.write(tmp_path)
    with pytest.raises(ValueError, match="as many contexts, got 16 and 64: evaluate"):
        tables(tmp_path, "smollm2")


def test_draw_names_the_figure_that_records_do_not_suffice_for(tmp_path: Path):
    write_records(tmp_path, "smollm2", seeds=(0,))
    assert len(draw(tmp_path, "smollm2", tmp_path, ["figure-3a"])) == 1
    with pytest.raises(ValueError, match="figure-5b cannot be drawn"):
        draw(tmp_path, "smollm2", tmp_path, ["figure-5b"])
    with pytest.raises(ValueError, match="figure-99"):
        draw(tmp_path, "smollm2", tmp_path, ["figure-99"])


def test_fill_replaces_what_stands_between_the_marks():
    document = (
        "a\n<!-- table fvu -->\nold\n<!-- end -->\nb\n<!-- table gap --><!-- end -->"
    )
    filled = fill(document, {"fvu": "| 1 |", "gap": "| 2 |"})
    assert filled == (
        "a\n<!-- table fvu -->\n\n| 1 |\n\n<!-- end -->\nb\n"
        "<!-- table gap -->\n\n| 2 |\n\n<!-- end -->"
    )
    assert fill(filled, {"fvu": "| 1 |", "gap": "| 2 |"}) == filled
    with pytest.raises(ValueError, match="names 'gap'"):
        fill(document, {"fvu": "| 1 |"})


def test_report_fills_documents_and_draws(
    records_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    document = tmp_path / "page.md"
    document.write_text("# Page\n<!-- table gap -->\n<!-- end -->\n")
    command = ["experiment", "report", "--preset", "smollm2"]
    command += ["--records", str(records_folder), "--documents", str(document)]
    images = ["--images", str(tmp_path / "images"), "--figures", "figure-3a"]
    assert main([*command, *images]) == 0
    gap = tables(records_folder, "smollm2")["gap"]
    assert gap in document.read_text()
    assert gap in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "images").iterdir()] == ["figure-3a.png"]


def test_report_changes_no_document_if_one_cannot_be_filled(
    records_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text("<!-- table gap --><!-- end -->")
    bad.write_text("<!-- table gaps --><!-- end -->")
    command = [
        "experiment",
        "report",
        "--preset",
        "smollm2",
        "--records",
        str(records_folder),
    ]
    assert main([*command, "--documents", str(good), str(bad)]) != 0
    assert "'gaps'" in capsys.readouterr().err
    assert good.read_text() == "<!-- table gap --><!-- end -->"


@pytest.mark.parametrize("folder", [EARLIER, RECORDS])
def test_published_records_belong_to_presets(folder: Path):
    """Their names are hashes of all settings: a changed recipe would lose them."""
    grids = [PRESETS[name] for name in PRESETS if name.startswith("smollm2")]
    planned = {run.name for grid in grids for run in grid.with_seeds()}
    published = {path.stem for path in folder.glob("*.json")}
    assert published
    assert not published - planned


@pytest.mark.parametrize("folder", [EARLIER, RECORDS])
def test_published_losses_are_of_one_text(folder: Path):
    found = [
        record.measures["loss_recovered"]
        for record in read_records(folder)
        if "loss_recovered" in record.measures
    ]
    assert found
    for domain in ("in_domain", "other_domain"):
        losses = [loss[domain]["without_sae"] for loss in found]
        # Another CPU shows in the fifth decimal, other documents in the first or second.
        assert max(losses) - min(losses) < 1e-4


@pytest.mark.parametrize(
    ("page", "folder"),
    [
        ("README.md", RECORDS),
        ("docs/ablations.md", EARLIER),
        ("docs/reproduction.md", RECORDS),
    ],
)
def test_published_tables_are_made_from_the_published_records(page: str, folder: Path):
    published = tables(folder, "smollm2")
    text = (ROOT / page).read_text()
    assert "<!-- table" in text
    assert fill(text, published) == text

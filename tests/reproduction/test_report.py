"""Tables and figures of a grid's records."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from experiment_records import write_records
from matplotlib.figure import Figure

from reproduction.__main__ import main
from reproduction.presets import PRESETS
from reproduction.records import read, read_records, write_tables
from reproduction.report import draw, fill, preset_runs, tables

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "reproduction" / "results"
# Each of one text.
EARLIER, RECORDS, DEFAULTS, EVIDENCE = (
    RESULTS / name
    for name in ("smollm2-earlier", "smollm2", "smollm2-defaults", "smollm2-evidence")
)


@pytest.fixture
def main_grid(tmp_path: Path) -> Path:
    write_records(tmp_path, "smollm2", seeds=(0,))
    return tmp_path


@pytest.fixture
def decompositions(tmp_path: Path) -> Path:
    write_records(tmp_path, "smollm2-decompositions", seeds=(0,))
    return tmp_path


def test_preset_runs_leaves_out_what_belongs_to_another_preset(
    records_folder: Path, tmp_path: Path
):
    names = {run.name for run in PRESETS["smollm2"].with_seeds((0, 1))}
    assert set(preset_runs(records_folder, "smollm2")["name"]) == names
    assert len(read(records_folder)) > len(names)
    with pytest.raises(ValueError, match="has no records"):
        preset_runs(tmp_path, "smollm2")


def test_records_of_different_texts_are_not_compared(main_grid: Path):
    record, *_ = read_records(main_grid)
    record.in_domain["mse"] *= 1.01
    record.write(main_grid)
    with pytest.raises(ValueError, match="one text.* is 5 in one place and 5.05 in"):
        preset_runs(main_grid, "smollm2")
    record.in_domain["fvu"] = math.nan
    record.write(main_grid)
    assert len(preset_runs(main_grid, "smollm2"))


def test_tables_hold_the_main_grid_and_every_ablation(records_folder: Path):
    found = tables(records_folder, "smollm2")
    main = {"fvu", "comparison", "gap", "gated", "loss-recovered", "redundancy"}
    assert {*main, "flops", "gated-comparison", "comparison-of-ceiling"} <= set(found)
    # 0.1 is added to every error there.
    assert f"{1 - 0.085 / 0.205:.1%}" in found["comparison"]
    assert f"{1 - 0.185 / 0.305:.1%}" in found["comparison-other-domain"]
    assert "Switch 18" not in found["fvu"]
    for name, row in (
        ("ablation-experts", "Scale 64/16, without scaling"),
        ("ablation-scaling", "Scale 64/16, double_softmax, without scaling"),
        ("ablation-decompositions", "Scale 64/2, learned"),
        ("ablation-gates", "Switch 32, softmax"),
        ("ablation-recipe", "Scale 256/8 no k-means"),
        ("ablation-flops", "Switch 18"),
        ("ablation-time", "a quarter of the tokens"),
        ("ablation-redundancy", "Switch 32 narrow"),
        ("length", "| 250,000 tokens | 500,000 tokens |"),
        ("length-comparison", "lower than Switch 32"),
        ("length-redundancy", "25.00%"),
    ):
        assert row in found[name]


def test_tables_leave_out_what_has_no_records(tmp_path: Path):
    write_records(tmp_path, "smollm2-length", seeds=(0,))
    for path in tmp_path.glob("scale*"):
        path.unlink()
    found = set(tables(tmp_path, "smollm2"))
    assert {"fvu", "length"} <= found
    assert not {"comparison", "length-comparison"} & found


def test_tables_of_the_main_grid_need_no_other_domain_and_are_no_ablations(
    main_grid: Path,
):
    for record in read_records(main_grid):
        record.other_domain = None
        record.write(main_grid)
    found = set(tables(main_grid, "smollm2"))
    assert "comparison" in found
    assert not {"comparison-other-domain", "fvu-other-domain"} & found
    # Of these the main grid has several runs.
    assert not {"ablation-flops", "length"} & found


def test_draw_draws_every_figure_beside_the_papers_numbers(
    records_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: dict[Path, int] = {}

    def save(figure: Figure, path: Path, **_: Any) -> None:
        drawn[path] = len(figure.axes)

    monkeypatch.setattr(Figure, "savefig", save)
    assert draw(records_folder, "smollm2", tmp_path) == [*drawn]
    assert len(drawn) == 22
    assert drawn[tmp_path / "figure-3a.png"] == 2


def test_draw_leaves_out_what_records_do_not_suffice_for(
    decompositions: Path, tmp_path: Path
):
    drawn = draw(decompositions, "smollm2", tmp_path / "images")
    names = {path.stem for path in drawn}
    assert "figure-10" in names
    assert not names & {"figure-3a", "figure-5b", "learning-curves"}
    write_records(tmp_path / "none", "smollm2-recipe", seeds=(0,))
    assert draw(tmp_path / "none", "smollm2", tmp_path) == []
    with pytest.raises(ValueError, match="figure-5b cannot be drawn"):
        draw(decompositions, "smollm2", tmp_path, ["figure-5b"])
    with pytest.raises(ValueError, match="figure-99"):
        draw(decompositions, "smollm2", tmp_path, ["figure-99"])


def test_losses_of_different_numbers_of_contexts_are_not_compared(decompositions: Path):
    found = set(tables(decompositions, "smollm2"))
    # Of the gates there is only the default's run.
    assert found & {"ablation-decompositions", "ablation-gates"} == {
        "ablation-decompositions"
    }
    record, *_ = read_records(decompositions)
    record.measures["loss_recovered"]["contexts"] = 64
    record.write(decompositions)
    message = "equally many contexts, got 16 and 64: evaluate"
    with pytest.raises(ValueError, match=message):
        tables(decompositions, "smollm2")


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


def test_report_fills_documents_all_or_none_and_draws(
    records_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    good, bad, images = (tmp_path / name for name in ("good.md", "bad.md", "images"))
    before = "# Page\n<!-- table gap -->\n<!-- end -->\n"
    good.write_text(before)
    bad.write_text("<!-- table gaps --><!-- end -->")
    command = ["report", "--preset", "smollm2", "--records", str(records_folder)]
    command += ["--documents", str(good)]
    assert main([*command, str(bad)]) != 0
    assert "'gaps'" in capsys.readouterr().err
    assert good.read_text() == before
    draw = ["--images", str(images), "--figures", "figure-3a"]
    assert main([*command, *draw]) == 0
    gap = tables(records_folder, "smollm2")["gap"]
    assert gap in good.read_text()
    assert gap in capsys.readouterr().out
    (picture,) = images.iterdir()
    assert picture.name == "figure-3a.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "folder", [EARLIER, RECORDS, DEFAULTS, EVIDENCE], ids=lambda folder: folder.name
)
def test_published_records_belong_to_presets(folder: Path):
    # Names are hashes of all settings: a changed recipe would lose them.
    grids = [PRESETS[name] for name in PRESETS if name.startswith("smollm2")]
    planned = {run.name for grid in grids for run in grid.with_seeds()}
    runs = read(folder)
    assert set() != set(runs["name"]) <= planned


@pytest.mark.parametrize("folder", [EARLIER, RECORDS], ids=lambda folder: folder.name)
def test_published_losses_are_of_one_text(folder: Path):
    runs = read(folder)
    for domain in ("in_domain", "other_domain"):
        losses = runs[f"measures.loss_recovered.{domain}.without_sae"].dropna()
        # Another CPU shows in the fifth decimal, other documents in the first or second.
        assert max(losses) - min(losses) < 1e-4


@pytest.mark.parametrize(
    ("page", "folder"),
    [
        ("README.md", RECORDS),
        ("docs/train.md", RECORDS),
        ("docs/ablations.md", EARLIER),
        ("docs/defaults.md", DEFAULTS),
        ("docs/comparison.md", EVIDENCE),
        ("docs/reproduction.md", RECORDS),
    ],
)
def test_published_tables_are_made_from_the_published_records(page: str, folder: Path):
    text = (ROOT / page).read_text()
    assert "<!-- table" in text
    assert fill(text, tables(folder, "smollm2")) == text


def test_scores_are_a_row_for_each_kind_of_sae_that_was_scored(
    main_grid: Path, tmp_path: Path
):
    published = tmp_path / "published"
    write_tables(main_grid, published)

    def group(name: str, seeds: int, **scores: float) -> dict[str, Any]:
        saes = [f"runs/{name}-s{seed}-0123abcd" for seed in range(seeds)]
        spread = 0.01 if seeds > 1 else None
        of_all = {"fvu": 0.5, "loss_recovered": None}
        of_all |= {f"probing_auc_{k}": 0.8 for k in (1, 5, 16)}
        return {
            "saes": saes,
            "scores": {
                metric: {"mean": value, "std": None if value is None else spread}
                for metric, value in (of_all | scores).items()
            },
        }

    groups = [
        group("topk-576-k32", 3, fvu=0.75),
        group("scale-256-8-recommended-k32", 1),
        group("scale-256-8-recommended-no-feature-scaling-k32", 2),
        group("another", 2),
    ]
    (published / "scores.json").write_text(json.dumps({"groups": groups}))
    lines = tables(published, "smollm2")["scores"].splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        ["| Scale SAE", "1", "0.500*"],
        ["| dense TopK, 576 latents (same cost)", "3", "0.750 ± 0.010"],
        ["| Scale SAE without feature scaling", "2", "0.500 ± 0.010"],
    ]
    assert lines[3].split(" | ")[3] == "-"

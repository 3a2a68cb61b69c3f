"""Tables and figures of an experiment's records."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_lens_scale.cli import main
from sae_lens_scale.experiments.presets import PRESETS
from sae_lens_scale.experiments.records import RunRecord, read, read_records
from sae_lens_scale.experiments.report import (
    cells,
    comparison,
    draw,
    fill,
    flops_table,
    gap_closed,
    l1_table,
    markdown,
    preset_runs,
    tables,
)

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "benchmarks" / "results" / "smollm2"
_FVU = {"Scale 64/2": 0.10, "Scale 256/8": 0.08, "Switch 32": 0.16, "TopK 576": 0.20}


def write_records(folder: Path, preset: str, seeds: tuple[int, ...] = (0, 1)) -> None:
    rng = np.random.default_rng(0)
    for run in PRESETS[preset].with_seeds(seeds):
        cfg = run.sae_config(576).to_dict()
        k, num_experts = cfg.get("k"), cfg.get("num_experts")
        # A Gated SAE's L0 is what its coefficient makes of it.
        k = k or round(100 / cfg["l1_coefficient"])
        fvu = _FVU.get(run.label, 0.12) + 0.01 * run.seed
        measures: dict[str, Any] = {
            "redundancy": {"share_above": 0.25},
            "activation_similarity": {"similarity": 0.1 + 0.01 * run.seed},
            "overlap_histogram": {"pairs": rng.integers(1, 9, k + 1).tolist()},
            "loss_recovered": {"in_domain": {"score": 1 - fvu}},
            "flops_per_token": {
                "training": {
                    "router": 37_000,
                    "encoder": 660_000,
                    "decoder": 1_150 * k,
                    "backward": 4_600 * k,
                    "total": 697_000 + 5_750 * k,
                },
            },
        }
        counts = [int(rng.integers(1, 99)) for _ in range(num_experts or 0)]
        if counts:
            similarity = {"intra": {"mean_cosine": 0.2}, "inter": {"mean_cosine": 0.1}}
            measures |= {
                "expert_usage": {"counts": counts},
                "expert_similarity": similarity,
            }
        if cfg.get("feature_scaling"):
            measures["scaling_factors"] = [float(rng.random()) for _ in counts]
        RunRecord(
            name=run.name,
            label=run.label,
            settings=asdict(run),
            sae_cfg=cfg,
            cache=None,
            environment={},
            seconds={"training": 60.0, "training_cpu": 50.0},
            curve=[
                {
                    "tokens": 64,
                    "seconds": 2.0,
                    "cpu_seconds": 1.0,
                    "fvu": fvu,
                    "mse": 5 * fvu,
                }
            ],
            in_domain={"fvu": fvu, "mse": 5 * fvu, "l0": float(k), "alive": 0.5},
            other_domain={"fvu": 2 * fvu, "mse": 10 * fvu},
            dead=0.1,
            measures=measures,
        ).write(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    for preset in PRESETS:
        if preset.startswith("smollm2"):
            write_records(folder, preset)
    return folder


def line(table: str, start: str) -> list[str]:
    (row,) = (x for x in table.splitlines() if x.startswith(f"| {start} |"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_cells_are_means_and_sample_deviations_over_seeds(folder: Path):
    runs = preset_runs(folder, "smollm2")
    mean, std, size = cells(runs, "fvu").loc["Scale 64/2", 8]
    assert (mean, std) == (pytest.approx(0.105), pytest.approx(0.01 / 2**0.5))
    assert size == 2


def test_a_single_run_is_marked_and_a_missing_one_is_a_dash(tmp_path: Path):
    write_records(tmp_path, "smollm2", seeds=(0,))
    runs = preset_runs(tmp_path, "smollm2")
    runs = runs.loc[~((runs["label"] == "TopK 576") & (runs["k"] == 8))]
    runs = runs.loc[runs["sae_cfg.k"].notna()]
    table = markdown(cells(runs, "fvu"), "{:.2f}".format, "")
    assert line(table, "TopK 576") == ["-", "0.20*", "0.20*", "0.20*"]


def test_rows_stand_in_the_order_of_the_preset(folder: Path):
    runs = preset_runs(folder, "smollm2")
    assert [*cells(runs, "fvu").index][:4] == [
        "Scale 64/2",
        "Scale 128/4",
        "Scale 256/8",
        "Scale 256/8 1 shared",
    ]


def test_preset_runs_leaves_out_what_belongs_to_another_preset(folder: Path):
    names = {run.name for run in PRESETS["smollm2"].with_seeds((0, 1))}
    assert set(preset_runs(folder, "smollm2")["name"]) == names
    assert len(read(folder)) > len(names)


def test_preset_runs_refuses_a_folder_without_records(tmp_path: Path):
    with pytest.raises(ValueError, match="has no records"):
        preset_runs(tmp_path, "smollm2")


def test_comparison_names_the_best_scale_sae_and_how_much_lower_it_is(folder: Path):
    table = comparison(preset_runs(folder, "smollm2"))
    assert line(table, "best Scale SAE")[:4] == ["Scale 256/8"] * 4
    lower = 1 - 0.085 / 0.205
    assert line(table, "lower than TopK 576")[:4] == [f"{lower:.1%}"] * 4


def test_comparison_needs_a_scale_sae(folder: Path):
    runs = preset_runs(folder, "smollm2")
    with pytest.raises(ValueError, match="must have a Scale SAE"):
        comparison(runs.loc[runs["label"] == "TopK 576"])


def test_gap_closed_is_a_share_of_what_lies_between(folder: Path):
    runs = preset_runs(folder, "smollm2")
    table = gap_closed(runs, "TopK 576", "Scale 256/8")
    assert line(table, "Switch 32")[0] == f"{(0.205 - 0.165) / (0.205 - 0.085):.0%}"
    with pytest.raises(ValueError, match="must have 'TopK 9'"):
        gap_closed(runs, "TopK 9", "Scale 256/8")


def test_l1_table_says_what_each_coefficient_makes(folder: Path):
    runs = preset_runs(folder, "smollm2")
    runs = runs.loc[runs["label"] == "Gated 576"]
    table = l1_table(runs)
    assert table.startswith("| Gated 576 | L1 = 0.5 | L1 = 1 | L1 = 2 |")
    assert line(table, "L0")[:2] == ["200.0 ± 0.0", "100.0 ± 0.0"]
    assert line(table, "FVU")[0] == "0.1250 ± 0.0071"
    assert line(table, "loss recovered")[0] == "0.8750 ± 0.0071"


def test_l1_table_leaves_out_what_was_not_measured(tmp_path: Path):
    write_records(tmp_path, "smollm2", seeds=(0,))
    runs = preset_runs(tmp_path, "smollm2")
    runs = runs.loc[runs["label"] == "Gated 576"]
    first = runs["sae_cfg.l1_coefficient"] == 0.5
    table = l1_table(runs.assign(loss_recovered=runs["loss_recovered"].where(first)))
    assert line(table, "loss recovered") == ["0.8800*", *["-"] * 5]
    assert "loss recovered" not in l1_table(runs.drop(columns="loss_recovered"))


def test_flops_table_is_of_the_k_that_most_have(folder: Path):
    runs = preset_runs(folder, "smollm2")
    runs = runs.loc[runs["sae_cfg.k"].notna()]
    table = flops_table(runs)
    assert table.startswith(
        "| k = 32 | router | encoder | decoder | backward | total |"
    )
    assert line(table, "Switch 32") == ["0.04", "0.66", "0.04", "0.15", "0.88"]
    assert table.count("Scale 256/8 |") == 1
    missing = {"Switch 32": 32, "TopK 576": 8, "Scale 64/2": 8}
    has = runs["label"].map(missing) != runs["k"]
    table = flops_table(runs.loc[has & runs["k"].isin([8, 32])])
    assert table.startswith("| k = 32 |")
    assert "TopK 576 |" in table
    assert "Switch 32 |" not in table
    full = runs["label"].str.startswith("Full")
    assert flops_table(runs.loc[~full]).startswith("| k = 8 |")


def test_tables_hold_the_main_grid_and_every_ablation(folder: Path):
    found = tables(folder, "smollm2")
    main = {"fvu", "comparison", "gap", "gated", "loss-recovered", "redundancy"}
    assert {*main, "flops"} <= set(found)
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


def test_tables_of_ablations_without_records_are_left_out(tmp_path: Path):
    write_records(tmp_path, "smollm2-decompositions", seeds=(0,))
    found = tables(tmp_path, "smollm2")
    assert "ablation-decompositions" in found
    assert "ablation-gates" not in found


def test_draw_draws_every_figure(folder: Path, tmp_path: Path):
    drawn = draw(folder, "smollm2", tmp_path / "images")
    assert len(drawn) == 18
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


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
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    document = tmp_path / "page.md"
    document.write_text("# Page\n<!-- table gap -->\n<!-- end -->\n")
    command = ["experiment", "report", "--preset", "smollm2"]
    command += ["--records", str(folder), "--documents", str(document)]
    images = ["--images", str(tmp_path / "images"), "--figures", "figure-3a"]
    assert main([*command, *images]) == 0
    gap = tables(folder, "smollm2")["gap"]
    assert gap in document.read_text()
    assert gap in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "images").iterdir()] == ["figure-3a.png"]


def test_report_changes_no_document_if_one_cannot_be_filled(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text("<!-- table gap --><!-- end -->")
    bad.write_text("<!-- table gaps --><!-- end -->")
    command = ["experiment", "report", "--preset", "smollm2", "--records", str(folder)]
    assert main([*command, "--documents", str(good), str(bad)]) != 0
    assert "'gaps'" in capsys.readouterr().err
    assert good.read_text() == "<!-- table gap --><!-- end -->"


def test_published_records_belong_to_presets():
    """Their names are hashes of all settings: a changed recipe would lose them."""
    grids = [PRESETS[name] for name in PRESETS if name.startswith("smollm2")]
    planned = {run.name for grid in grids for run in grid.with_seeds()}
    published = {path.stem for path in PUBLISHED.glob("*.json")}
    assert published
    assert not published - planned


def test_published_losses_are_of_one_text():
    found = [
        record.measures["loss_recovered"]
        for record in read_records(PUBLISHED)
        if "loss_recovered" in record.measures
    ]
    for domain in ("in_domain", "other_domain"):
        assert len({f"{loss[domain]['without_sae']:.6f}" for loss in found}) == 1


@pytest.mark.parametrize("page", ["README.md", "docs/reproduction.md"])
def test_published_tables_are_made_from_the_published_records(page: str):
    published = tables(PUBLISHED, "smollm2")
    text = (ROOT / page).read_text()
    assert "<!-- table" in text
    assert fill(text, published) == text

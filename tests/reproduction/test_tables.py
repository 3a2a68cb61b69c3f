"""Tables of made-up runs."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from reproduction.report import preset_runs
from reproduction.tables import (
    best_cells,
    cells,
    comparison,
    flops_table,
    gap_closed,
    gated_comparison,
    l1_table,
    markdown,
    summary,
)


@pytest.fixture(scope="module")
def all_runs(records_folder: Path) -> pd.DataFrame:
    return preset_runs(records_folder, "smollm2")


@pytest.fixture(scope="module")
def runs(all_runs: pd.DataFrame) -> pd.DataFrame:
    """Runs that have a k."""
    return all_runs.loc[all_runs["sae_cfg.k"].notna()]


@pytest.fixture(scope="module")
def gated(all_runs: pd.DataFrame) -> pd.DataFrame:
    return all_runs.loc[all_runs["label"] == "Gated 576"]


@pytest.fixture(scope="module")
def few(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs of three labels, of which Scale 64/2 is the best at k = 8 only."""
    few = runs.loc[runs["label"].isin(["Scale 64/2", "Scale 256/8", "TopK 576"])]
    first = (few["label"] == "Scale 64/2") & (few["k"] == 8)
    return few.assign(fvu=few["fvu"].mask(first, 0.05))


def line(table: str, start: str) -> list[str]:
    (row,) = (x for x in table.splitlines() if x.startswith(f"| {start} |"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def run(label: str, seed: int, fvu: float, k: int = 32, lr: float = 1e-3) -> Any:
    measures = {"fvu": fvu, "l0": 30.0 + seed, "alive": 0.5, "dead": 0.25}
    settings = {"settings.seed": seed, "settings.lr": lr}
    return {"label": label, "k": k, **measures, **settings}


def test_a_summary_has_mean_and_spread_over_seeds():
    runs = [run("A 1", seed, fvu) for seed, fvu in enumerate([0.1, 0.14, 0.15])]
    runs += [run("A 1", 0, 0.3, k=8), run("B 2", 0, 0.5)]
    header, *lines = summary(pd.DataFrame(runs)).splitlines()
    assert header.split() == ["label", "k", "fvu", "l0", "alive", "dead", "runs"]
    assert [x.split()[:3] for x in lines] == [
        ["A", "1", "8"],
        ["A", "1", "32"],
        ["B", "2", "32"],
    ]
    assert lines[1].split()[3:6] == ["0.1300", "±", "0.0265"]
    assert lines[1].split()[-4:] == ["0.2500", "±", "0.0000", "3"]
    assert lines[2].split()[3:] == ["0.5000", "30.0000", "0.5000", "0.2500", "1"]


def test_a_summary_does_not_average_settings_that_differ():
    fast = {**run("A 1", 0, 0.4, lr=2e-3), "settings.lr_factors.omega": 2.0}
    runs = pd.DataFrame([run("A 1", 0, 0.1), run("A 1", 1, 0.2), fast])
    header, *lines = summary(runs).splitlines()
    settings = ["settings.lr", "settings.lr_factors.omega"]
    assert header.split()[:4] == ["label", "k", *settings]
    assert [x.split()[3:5] for x in lines] == [["0.001", "NaN"], ["0.002", "2.0"]]
    assert [x.split()[-1] for x in lines] == ["2", "1"]


def test_cells_are_means_and_deviations_in_order_whatever_the_first_row_lacks(
    runs: pd.DataFrame,
):
    lacks = (runs["label"] == "Scale 64/2") & (runs["k"] < 32)
    frame = cells(runs.loc[~lacks], "fvu")
    assert [*frame.columns] == [8, 16, 32, 64]
    assert [*frame.index][:3] == ["Scale 64/2", "Scale 128/4", "Scale 256/8"]
    assert frame.loc["Scale 64/2"].isna().tolist() == [True, True, False, False]
    want = (0.105, 0.01 / 2**0.5, 2)
    assert frame.loc["Scale 64/2", 32] == pytest.approx(want)


def test_a_single_run_is_marked_and_a_missing_one_is_a_dash(runs: pd.DataFrame):
    runs = runs.loc[runs["seed"] == 0]
    runs = runs.loc[~((runs["label"] == "TopK 576") & (runs["k"] == 8))]
    table = markdown(cells(runs, "fvu"), "{:.2f}".format)
    assert line(table, "TopK 576") == ["-", "0.20*", "0.20*", "0.20*"]


def test_the_best_of_a_kind_is_another_one_at_another_k(few: pd.DataFrame):
    table = markdown(best_cells(few, {"Scale": "ours", "Gated": "no"}), "{:.3f}".format)
    best = cells(few, "fvu")
    want = [best.loc["Scale 64/2", 8], *best.loc["Scale 256/8"].iloc[1:]]
    assert line(table, "ours") == [f"{m:.3f} ± {std:.3f}" for m, std, _ in want]
    assert "no" not in table


def test_comparison_names_the_best_scale_sae_and_how_much_lower_it_is(
    few: pd.DataFrame,
):
    table = comparison(few)
    assert line(table, "best Scale SAE") == ["Scale 64/2", *["Scale 256/8"] * 3]
    # Seed by seed 1 - 0.08 / 0.2 and 1 - 0.09 / 0.21.
    lower = f"{1 - 0.085 / 0.205:.1%} (60.0, 57.1)"
    assert line(table, "lower than TopK 576")[1:] == [lower] * 3
    lower = f"{1 - 0.085 / 0.105:.1%} (20.0, 18.2)"
    assert line(table, "lower than Scale 64/2") == ["-", *[lower] * 3]
    with pytest.raises(ValueError, match="must have a Scale SAE"):
        comparison(few.loc[few["label"] == "TopK 576"])


def test_comparisons_are_of_the_seeds_that_all_have(runs: pd.DataFrame):
    # Seed 1 is 0.01 worse everywhere.
    second = runs["seed"] == 1
    runs = runs.loc[~((runs["label"] == "TopK 576") & second)]
    runs = runs.loc[~((runs["label"] == "Switch 32") & (runs["k"] > 8))]
    runs = runs.loc[~((runs["label"] == "Switch 32 softmax") & ~second)]
    table = comparison(runs)
    assert line(table, "lower than TopK 576")[0] == f"{1 - 0.08 / 0.2:.1%}*"
    lower = f"{1 - 0.085 / 0.125:.1%} (33.3, 30.8)"
    assert line(table, "lower than Switch 32 authors")[0] == lower
    assert line(table, "lower than Switch 32")[1:] == ["-", "-", "-"]
    table = gap_closed(runs, "TopK 576", "Scale 256/8")
    assert line(table, "Switch 32")[0] == f"{(0.2 - 0.16) / (0.2 - 0.08):.0%}*"
    assert line(table, "Switch 32")[1:] == ["-", "-", "-"]
    # Of the seed that the floor lacks.
    assert "| Switch 32 softmax |" not in table


def test_comparison_of_another_kind_has_the_columns_that_it_has(runs: pd.DataFrame):
    runs = runs.loc[runs["label"].isin(["Switch 32", "TopK 576"])]
    runs = runs.loc[~((runs["label"] == "Switch 32") & (runs["k"] > 8))]
    table = comparison(runs, kind="Switch")
    assert table.startswith("|  | k = 8 |\n")
    assert line(table, "best Switch SAE") == ["Switch 32"]
    lower = f"{1 - 0.165 / 0.205:.1%} (20.0, 19.0)"
    assert line(table, "lower than TopK 576") == [lower]


def test_comparison_of_lengths_has_a_column_for_each(records_folder: Path):
    runs = preset_runs(records_folder, "smollm2-length")
    table = comparison(runs, columns="settings.training_tokens")
    tokens = [f"{n} tokens" for n in ("250,000", "500,000", "1,000,000", "2,000,000")]
    assert line(table, "")[:4] == tokens
    lower = f"{1 - 0.125 / 0.205:.1%} (40.0, 38.1)"
    assert line(table, "lower than TopK 576")[:4] == [lower] * 4


def test_gap_closed_is_a_share_of_what_lies_below_the_best_at_each_k(
    runs: pd.DataFrame, few: pd.DataFrame
):
    table = gap_closed(runs, "TopK 576", "Scale 256/8")
    closed = f"{(0.205 - 0.165) / (0.205 - 0.085):.0%} (33, 33)"
    assert line(table, "Switch 32")[0] == closed
    table = gap_closed(few, "TopK 576", "Scale")
    assert line(table, "of the gap to") == ["Scale 64/2", *["Scale 256/8"] * 3]
    assert line(table, "Scale 64/2")[0] == line(table, "Scale 256/8")[1] == "-"
    closed = (0.205 - 0.105) / (0.205 - 0.085)
    assert line(table, "Scale 64/2")[1].startswith(f"{closed:.0%} (")
    with pytest.raises(ValueError, match="must have 'TopK 9'"):
        gap_closed(runs, "TopK 9", "Scale 256/8")
    with pytest.raises(ValueError, match="must have a Full SAE 9 SAE"):
        gap_closed(runs, "TopK 576", "Full SAE 9")


def test_the_gap_without_a_k_that_both_ends_have_is_no_row(runs: pd.DataFrame):
    floor = (runs["label"] == "TopK 576") & (runs["k"] == 8)
    ceiling = (runs["label"] == "Full TopK 18432") & (runs["k"] == 32)
    table = gap_closed(runs.loc[floor | ceiling], "TopK 576", "Full TopK")
    assert "576" not in table


def test_l1_table_says_what_each_coefficient_makes(gated: pd.DataFrame):
    table = l1_table(gated)
    assert table.startswith("| Gated 576 | L1 = 0.5 | L1 = 1 | L1 = 2 |")
    assert line(table, "L0")[:2] == ["200.0 ± 0.0", "100.0 ± 0.0"]
    assert line(table, "FVU")[0] == "0.1250 ± 0.0071"
    assert line(table, "loss recovered")[0] == "0.8750 ± 0.0071"
    one = gated.loc[gated["seed"] == 0]
    first = one["sae_cfg.l1_coefficient"] == 0.5
    table = l1_table(one.assign(loss_recovered=one["loss_recovered"].where(first)))
    assert line(table, "loss recovered") == ["0.8800*", *["-"] * 5]
    assert "loss recovered" not in l1_table(one.drop(columns="loss_recovered"))


def test_flops_table_is_of_the_k_that_most_have(runs: pd.DataFrame):
    full = runs["label"].str.startswith("Full")
    table = flops_table(runs.loc[~full | (runs["k"] == 32)])
    parts = "router | encoder | decoder | backward | total"
    assert table.startswith(f"| k = 32 | {parts} |")
    assert line(table, "Switch 32") == ["0.04", "0.66", "0.04", "0.15", "0.88"]
    assert table.count("Scale 256/8 |") == 1
    missing = {"Switch 32": 32, "TopK 576": 8, "Scale 64/2": 8}
    has = runs["label"].map(missing.get) != runs["k"]
    table = flops_table(runs.loc[has & runs["k"].isin([8, 32])])
    assert table.startswith("| k = 32 |")
    assert "TopK 576 |" in table
    assert "Switch 32 |" not in table
    at_every_k = runs.groupby("label")["k"].transform("nunique") == 4
    assert flops_table(runs.loc[at_every_k]).startswith("| k = 8 |")


def test_gated_comparison_is_between_the_k_on_either_side(
    runs: pd.DataFrame, gated: pd.DataFrame
):
    others = runs.loc[runs["label"].isin(["Scale 64/2", "Full TopK 18432"])]
    others = others.loc[(others["label"] == "Scale 64/2") | (others["k"] >= 32)]
    # L0 are 200, 100, 50, 25, 12 and 6; 1 / k is a straight line of the logarithms.
    others = others.assign(fvu=1 / others["k"])
    table = gated_comparison(gated, others)
    assert table.startswith("| lower than Gated | L0 = 50.0 | L0 = 25.0 | L0 = 12.0 |")
    want = [f"{1 - 1 / l0 / 0.125:.1%}" for l0 in (50, 25, 12)]
    assert line(table, "Scale 64/2") == want
    assert line(table, "Full TopK 18432") == [want[0], "-", "-"]
    assert gated_comparison(gated.assign(l0=7.0), others) == ""

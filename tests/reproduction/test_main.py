"""The laboratory's commands."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from experiment_records import write_records
from sae_lens import HookedSAETransformer
from tiny_cache import SETTINGS, TEXTS, write_random_cache

from reproduction import __main__ as command_module
from reproduction.__main__ import main, select_runs
from reproduction.caching import cache_activations
from reproduction.presets import PRESETS
from reproduction.records import read, read_records
from reproduction.settings import RunSettings

ROOT = Path(__file__).parents[2]
SCALE = RunSettings("scale", {"d_sae": 64, "num_experts": 8, "k": 4})
TOPK = RunSettings("topk", {"d_sae": 16, "k": 4})
GATED = RunSettings("gated", {"d_sae": 16})


def test_a_grid_is_trained_from_the_command_line(
    tiny_model: HookedSAETransformer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    names = ("hook_name", "train_tokens", "test_tokens", "other_tokens", "context_size")
    changes = {name: getattr(SETTINGS, name) for name in names}
    cache = replace(PRESETS["smollm2"].cache, **changes)
    cache_activations(cache, tmp_path / "activations", model=tiny_model, texts=TEXTS)
    preset = ["--preset", "smollm2", "--folder", str(tmp_path)]
    preset += ["--cache", *(f"{name}={value}" for name, value in changes.items())]
    command = ["run", *preset, "--only", "topk-576-k8", "--seeds", "0", "3"]
    command += ["--keep_weights", "--set", "training_tokens=640", "batch_size=64"]
    command += ["d_sae=32", "lr=1e-3,2e-3"]
    assert main([*command, "--list"]) == 0
    names = capsys.readouterr().out.split()
    assert not (tmp_path / "runs").exists()
    assert main(command) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:3] == ["label", "k", "settings.lr"]
    assert [line.split()[:4] for line in out[1:]] == [
        ["TopK", "32", "8", "0.001"],
        ["TopK", "32", "8", "0.002"],
    ]
    records = read_records(tmp_path / "runs")
    assert sorted(record.name for record in records) == sorted(names)
    found = {(r.settings["lr"], r.settings["seed"]) for r in records}
    assert found == {(1e-3, 0), (1e-3, 3), (2e-3, 0), (2e-3, 3)}
    assert min(read(tmp_path / "runs")["mse_other_domain"].tolist()) > 0
    assert all((tmp_path / "runs" / name / "cfg.json").exists() for name in names)
    # Activations that are there already are found, and nothing is cached.
    assert main(["cache", *preset]) == 0
    hashes = (records[0].cache or {})["texts"]
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / "activations"),
        *(f"{name}: {hashes[name]}" for name in hashes),
    ]


def test_processes_of_the_command_find_the_laboratory(tmp_path: Path):
    changes = {"train_tokens": 700, "test_tokens": 100, "other_tokens": 100}
    cache = replace(PRESETS["smollm2"].cache, **changes)
    write_random_cache(tmp_path / "activations", cache)
    command = [sys.executable, "-m", "reproduction", "run", "--preset", "smollm2"]
    command += ["--folder", str(tmp_path), "--only", "topk-576-k8", "--workers", "2"]
    command += ["--cache", *(f"{name}={value}" for name, value in changes.items())]
    command += ["--set", "training_tokens=128", "batch_size=64", "d_sae=32"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert [r.environment["workers"] for r in read_records(tmp_path / "runs")] == [2, 2]


def test_records_become_tables_that_report_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_records(tmp_path / "runs", "smollm2-decompositions", seeds=(0,))
    tables = tmp_path / "tables"
    preset = ["--preset", "smollm2", "--folder", str(tmp_path)]
    assert main(["table", *preset, "--output", str(tables)]) == 0
    assert capsys.readouterr().out.split() == [
        str(tables / name) for name in ("runs.csv", "curves.csv", "lists.jsonl")
    ]
    assert main(["report", *preset]) == 0
    of_records = capsys.readouterr().out
    assert main(["report", *preset, "--records", str(tables)]) == 0
    assert capsys.readouterr().out == of_records
    assert "ablation-decompositions" in of_records


def test_a_command_ends_as_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def terminate(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    assert before is not signal.default_int_handler
    monkeypatch.setattr(command_module, "tables", terminate)
    assert main(["report", "--preset", "smollm2"]) == 130
    assert capsys.readouterr().err == "reproduction: error: interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_shows_where_it_came_from_on_request(tmp_path: Path):
    folder = ["--preset", "smollm2", "--folder", str(tmp_path)]
    with pytest.raises(FileNotFoundError, match="is no folder"):
        main(["--traceback", "report", *folder])


def test_evaluate_says_what_has_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write_records(tmp_path / "runs", "smollm2-time", seeds=(0,))
    (first, *_) = records = read_records(tmp_path / "runs")
    del first.measures["loss_recovered"]
    first.write(tmp_path / "runs")
    monkeypatch.setattr(
        command_module, "evaluate_records", lambda *_, **__: records[1:]
    )
    command = ["evaluate", "--preset", "smollm2", "--contexts", "16"]
    assert main([*command, "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out == (
        f"{len(records) - 1} records in {tmp_path / 'runs'} were evaluated, 1 could not "
        "be: run --keep_weights\n"
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("run --folder nowhere", "nowhere/activations/train holds no activations"),
        ("run --only nonsense", "no run's name contains 'nonsense': scale-64-2-k8-s0"),
        ("run --set nonsense=1", "'nonsense' is neither a setting nor a field"),
        ("run --set lr", "a change must be NAME=VALUE, got 'lr'"),
        ("run --cache nonsense=1", "--cache must set one of context_size, hook_name"),
        ("run --set lr=1e-3 lr=2e-3", "lr must be set once, its values separated by"),
        (
            "run --set training_tokens=1.5",
            "training_tokens must be a whole number, got",
        ),
        ("run --set lr=high", "lr must be a number, got 'high'"),
        ("run --set k=8.5", "k must be a whole number, got 8.5"),
        ("cache --cache train_tokens=1e-3", "train_tokens must be a whole number, got"),
        ("run --set autocast=False", "autocast must be true or false, got 'False'"),
        ("run --set autocast=0", "autocast must be true or false, got 0"),
        ("run --set lr_factors=0.1", "lr_factors must be an object such as"),
        ("run --set sae=5", "sae must be an object such as"),
        ("run --set variant=5", "variant must be a text, got 5"),
        ("run --set lr_end=high", "lr_end must be a number or null, got 'high'"),
        (
            "run --set use_sparse_activations=no",
            "use_sparse_activations must be true or false, got 'no'",
        ),
        ("cache --cache text=5", "text must be a text, got 5"),
        ("cache --cache train_tokens=0", "train_tokens must be positive, got 0"),
        ("evaluate --folder nowhere", "nowhere/runs is no folder"),
        ("table --folder nowhere --output tables", "nowhere/runs is no folder"),
    ],
)
def test_errors_are_one_line(
    command: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    step, *options = command.split()
    assert main([step, "--preset", "smollm2", *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.startswith("reproduction: error: ")
    assert captured.err.count("\n") == 1


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]):
    preset = ["--preset", "smollm2"]
    for command in (
        [],
        ["run"],
        ["run", "--preset", "nonsense"],
        ["run", *preset, "--workers", "0"],
        ["run", *preset, "--threads", "-1"],
        ["cache", *preset, "--prompts_per_batch", "0"],
        ["evaluate", *preset, "--contexts", "0"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2
        assert "usage: python -m reproduction" in capsys.readouterr().err


def test_changes_reach_settings_and_fields_of_SAEs():
    runs = select_runs([SCALE, TOPK, GATED], ["lr=1e-3", "k=2,8", "gate=softmax"])
    assert all(run.lr == 1e-3 for run in runs)
    assert [(run.architecture, run.sae.get("k")) for run in runs] == [
        ("scale", 2),
        ("scale", 8),
        ("topk", 2),
        ("topk", 8),
        ("gated", None),
    ]
    assert [run.sae.get("gate") for run in runs] == ["softmax"] * 2 + [None] * 3
    (run,) = select_runs([SCALE], ['lr_factors={"omega": 2, "W_router": 0.1}'])
    assert run.lr_factors == {"omega": 2, "W_router": 0.1}
    # However a number is written, it is the same run.
    short, long = (
        select_runs(
            [SCALE], [f"training_tokens={tokens}", f"k={k}", f"lr={lr}", f"lr_end={lr}"]
        )
        for tokens, k, lr in (("1e6", "2.0", "1"), ("1000000", "2", "1.0"))
    )
    assert short == long
    assert short[0].name == long[0].name
    # Runs that become the same are one.
    other = replace(SCALE, lr=1e-3)
    assert len(select_runs([SCALE, other], ["lr=1e-4"])) == 1
    assert select_runs([SCALE, TOPK, GATED], only="k4-s0") == [SCALE, TOPK]
    assert select_runs([SCALE, TOPK], only="scale*k4") == [SCALE]

"""The command line as a whole: usage, errors, exit codes, pipes."""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from cli.runs import Run

from sae_lens_scale import __version__
from sae_lens_scale.cli import main


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("train --architecture nonsense", 2, "invalid choice: 'nonsense'"),
        ("train --architecture scale --nonsense 1", 2, "arguments: --nonsense 1"),
        ("train --architecture scale --num_experts x", 2, "positive integer, got 'x'"),
        ("train --architecture scale --d_sae x", 2, "--d_sae: must be a positive"),
        ("train --architecture topk --k x", 2, "invalid int value: 'x'"),
        ("train --recipe none --train_batch 0", 1, "must be positive, got 0"),
        ("train --architecture topk --feature_sampling_window 0", 1, "got 0"),
        ("train --architecture scale --num_experts 7", 1, "and num_experts=7"),
        ("train --architecture switch --k 1000", 1, "got d_sae=1024 and k=1000"),
        ("evaluate nowhere", 1, "nowhere is no folder"),
        ("evaluate nowhere some-id", 1, "nowhere not found"),
        (
            "evaluate some-id nowhere( ",
            1,
            "nowhere( is no release or SAE, nor a regular",
        ),
        ("info .", 1, "cfg.json"),
        ("convert nowhere target", 1, "nowhere"),
        ("evaluate . --output nowhere/metrics.json", 1, "nowhere is no folder"),
    ],
)
def test_errors_are_one_line_without_a_traceback(
    command: str,
    status: int,
    message: str,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.chdir(tmp_path)
    captured = run(command, status)
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.startswith("sae-lens-scale: error: ")
    assert captured.err.count("\n") == 1


POSITIVE = "must be a positive integer, got"
FACTOR = (
    "must be NAME=FACTOR, such as b_enc=0.5, with a finite factor of at least 0, got"
)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "the following arguments are required"),
        ("experiment", "invalid choice: 'experiment'"),
        ("info", "the following arguments are required"),
        ("info folder id more", "unrecognized arguments: more"),
        ("evaluate folder --batch_size_prompts 0", f"{POSITIVE} '0'"),
        ("evaluate folder --batch_size_prompts -3", f"{POSITIVE} '-3'"),
        ("evaluate folder --batch_size_prompts x", f"{POSITIVE} 'x'"),
        ("train --lr_factors W_router", f"{FACTOR} 'W_router'"),
        ("train --lr_factors W_router=", f"{FACTOR} 'W_router='"),
        ("train --lr_factors W_router=fast", f"{FACTOR} 'W_router=fast'"),
        ("train --lr_factors W_router=-1", f"{FACTOR} 'W_router=-1'"),
        ("train --lr_factors W_router=nan", f"{FACTOR} 'W_router=nan'"),
        ("train --lr_factors =0.5", f"{FACTOR} '=0.5'"),
        ("evaluate folder --dtype int8", "invalid choice: 'int8'"),
        ("convert a b --k 0", f"--k: {POSITIVE} '0'"),
        ("convert a b --experts_per_token -1", f"--experts_per_token: {POSITIVE} '-1'"),
    ],
)
def test_wrong_usage_exits_with_2(command: str, message: str, run: Run):
    err = run(command, 2).err
    assert err.startswith("usage: sae-lens-scale")
    assert message in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", ""],
        ["info", "release", ""],
        ["evaluate", "folder", ""],
        ["evaluate", "folder", "--model", ""],
        ["evaluate", "folder", "--datasets", "text", ""],
        ["evaluate", "folder", "--output", ""],
        ["convert", "", "target"],
        ["convert", "ae.pt", "target", "--hook_name", ""],
        ["upload", "", "lab/saes"],
        ["upload", "folder", "lab/saes", "--metrics", ""],
        # Both would write into the root folder, or the current one.
        ["train", "--architecture", "scale", "--checkpoint_path", ""],
        ["train", "--architecture", "topk", "--output_path="],
        ["train", "--architecture", "topk", "--output_p", ""],
    ],
)
def test_empty_arguments_are_wrong_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "must not be empty" in capsys.readouterr().err


def test_version_is_the_packages(run: Run):
    assert run("--version").out == f"sae-lens-scale {__version__}\n"


def test_a_traceback_is_there_for_the_asking():
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "info", "nowhere"])


def test_the_help_is_plain_text(run: Run):
    assert "`" not in run("--help").out


def test_the_command_is_installed():
    (script,) = entry_points(group="console_scripts", name="sae-lens-scale")
    assert script.load() is main


def test_the_package_is_the_same_command():
    command = [sys.executable, "-m", "sae_lens_scale", "info", "nowhere"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    message = "nowhere is no folder; of a release or repository, name the SAE too"
    assert done.stderr.splitlines()[-1] == f"sae-lens-scale: error: {message}"


def test_closed_pipe_ends_a_command_quietly(
    untrained: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["info", str(untrained)]) == 0
        # As Python does at exit.
        closed.flush()
    assert capsys.readouterr().err == ""

"""Faults of distributed training: processes that die, hang, are late or interrupted."""

import json
import os
import subprocess
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.runs import train_command
from distributed import runners, work
from distributed.launch import checkpoints, finish, torchrun
from distributed.processes import Processes
from sae_lens import SAE

from sae_lens_scale.cli import main

pytestmark = pytest.mark.slow

RECIPE = {
    "k": 3,
    "multi_topk_coefficient": 1 / 8,
    "aux_loss_coefficient": 1 / 4,
    "router_lr_factor": 1 / 8,
    "initialize_from_activations": True,
}
# A checkpoint after 16 steps, and the run's other 14.
CHECKPOINTS: dict[str, Any] = {"n_checkpoints": 1}
SAVED = str(16 * work.BATCH)


def assert_same(got: dict[str, Any], want: dict[str, Any], tolerance: float) -> None:
    assert got["samples"] == want["samples"]
    assert torch.equal(got["since_fired"], want["since_fired"])
    for name, tensor in want["weights"].items():
        torch.testing.assert_close(
            got["weights"][name], tensor, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize(
    ("size", "expert_parallel", "others"),
    [
        (2, 2, [(3, 1), (3, 3)]),
        (4, 2, [(1, 1), (2, 2)]),
        # Five experts: 1, 2 and 2.
        (3, 3, [(2, 2), (1, 1)]),
        (2, 1, [(4, 4)]),
    ],
)
def test_a_run_goes_on_as_if_it_had_not_stopped_also_on_other_processes(
    processes: Callable[[int], Processes],
    size: int,
    expert_parallel: int,
    others: list[tuple[int, int]],
    tmp_path: Path,
):
    folder = {**CHECKPOINTS, "checkpoint_path": str(tmp_path)}
    arguments = ("scale", RECIPE, folder, expert_parallel, None)
    whole = processes(size).run(work.train, *arguments)[0]
    checkpoint = tmp_path / SAVED
    assert [path.name for path in tmp_path.iterdir()] == [SAVED]

    arguments = ("scale", RECIPE, {}, expert_parallel, None, checkpoint)
    again = processes(size).run(work.train, *arguments)[0]
    assert_same(again, whole, tolerance=0)
    assert again["logged"] == whole["logged"][16:]
    for other_size, other_experts in others:
        if other_size == 1:
            other = work.train_on_one("scale", RECIPE, {}, checkpoint)
        else:
            arguments = ("scale", RECIPE, {}, other_experts, None, checkpoint)
            other = processes(other_size).run(work.train, *arguments)[0]
        assert_same(other, whole, tolerance=1e-10)


def test_a_run_of_one_process_goes_on_on_several(
    processes: Callable[[int], Processes], tmp_path: Path
):
    folder = {**CHECKPOINTS, "checkpoint_path": str(tmp_path)}
    whole = work.train_on_one("scale", RECIPE, folder)
    arguments = ("scale", RECIPE, {}, 3, None, tmp_path / SAVED)
    assert_same(processes(3).run(work.train, *arguments)[0], whole, tolerance=1e-10)


def test_a_late_process_changes_nothing(processes: Callable[[int], Processes]):
    arguments = ("scale", RECIPE, {}, 2)
    on_time = processes(2).run(work.train, *arguments)[0]
    arguments = (*arguments, None, None, work.late_on_last)
    assert_same(processes(2).run(work.train, *arguments)[0], on_time, tolerance=0)


@pytest.mark.parametrize(
    ("start", "step", "error"),
    [
        (True, 0, "batch must be finite"),
        # The start goes on, with more batches.
        (True, 7, "batch must be finite"),
        (False, 7, "the loss is not finite at training step 7 "),
    ],
)
@pytest.mark.parametrize(("size", "expert_parallel"), [(2, 1), (2, 2), (4, 2)])
def test_nan_in_one_process_stops_all_before_weights_change(
    processes: Callable[[int], Processes],
    size: int,
    expert_parallel: int,
    start: bool,
    step: int,
    error: str,
):
    overrides = RECIPE | {"initialize_from_activations": start}
    disturb = partial(work.nan_on_last, step)
    arguments = ("scale", overrides, {}, expert_parallel, None, None, disturb)
    for result in processes(size).run(work.train_until_error, *arguments):
        assert result["error"].startswith(error)
        assert result["optimizer_steps"] == ({step} if step else set())
        assert result["finite"]


def test_without_room_on_the_disk_all_fail_and_earlier_checkpoints_stay(
    processes: Callable[[int], Processes], tmp_path: Path
):
    arguments = (tmp_path, "scale", RECIPE, {}, 2)
    first, second = processes(2).run(work.save_on_full_disk, *arguments)
    assert "File too large" in first
    assert second == f"RuntimeError: the first process failed: {first}"
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_signal_at_the_end_takes_effect_once_the_sae_is_saved(
    processes: Callable[[int], Processes], tiny_llama: Path, tmp_path: Path
):
    found = processes(2).run(runners.interrupted_at_the_end, tiny_llama, tmp_path)
    assert found == [[], [True]]


def test_a_save_may_take_longer_than_any_other_wait():
    group = Processes(2, timedelta(seconds=3))
    (first, done), (second, nothing) = group.run(work.wait_for_the_first, 5.0)
    assert min(first, second) >= 4.5
    assert (done, nothing) == ("done", None)
    group.close()


def test_the_others_end_soon_when_the_first_process_dies_saving(tmp_path: Path):
    group = Processes(2)
    with pytest.raises(AssertionError, match="processes died"):
        group.run(work.wait_for_a_first_that_dies, tmp_path)
    group.close()
    assert float((tmp_path / "seconds").read_text()) < 10


@pytest.mark.parametrize("restarts", [[1, 1], [0, 1], [1, 0]], ids=str)
def test_processes_agree_on_the_checkpoint_where_each_machine_counts_its_restarts(
    processes: Callable[[int], Processes], restarts: list[int], tmp_path: Path
):
    for name in ("512", "1024", "final_2048", ".saving-1024"):
        (tmp_path / "job" / name).mkdir(parents=True)
    found = processes(2).run(runners.shared_checkpoints, tmp_path, "job", 3, restarts)
    assert found == [(str(tmp_path / "job"), str(tmp_path / "job" / "1024"))] * 2
    # A process has died writing it.
    assert not (tmp_path / "job" / ".saving-1024").exists()


def test_a_run_of_an_earlier_ones_name_has_to_say_that_it_goes_on_from_there(
    processes: Callable[[int], Processes], tmp_path: Path
):
    arguments = (tmp_path, "job", 3, [0, 0])
    # A run of the name that died before its first checkpoint is in nobody's way.
    (tmp_path / "job" / ".saving-512").mkdir(parents=True)
    found = processes(2).run(runners.shared_checkpoints, *arguments)
    assert found == [(str(tmp_path / "job"), None)] * 2
    (tmp_path / "job" / "512").mkdir()
    with pytest.raises(
        RuntimeError,
        match="--rdzv-id must be another than job, or checkpoint_path.*/512",
    ):
        processes(2).run(runners.shared_checkpoints, *arguments)
    # It may be about to finish.
    assert (tmp_path / "job" / ".saving-512").exists()
    found = processes(2).run(runners.shared_checkpoints, *arguments, "elsewhere/256")
    assert found == [(str(tmp_path / "job"), "elsewhere/256")] * 2


def test_processes_that_torchrun_may_restart_need_a_name_of_the_run(
    processes: Callable[[int], Processes], tmp_path: Path
):
    for run_id in ("none", "job"):
        # Several runs of one launch have folders of their own.
        (tmp_path / "job" / "512").mkdir(parents=True, exist_ok=True)
        arguments = (tmp_path, run_id, 0, [0, 0])
        found = processes(2).run(runners.shared_checkpoints, *arguments)
        assert found == [(str(tmp_path / "0"), None)] * 2
    with pytest.raises(RuntimeError, match="--rdzv-id must name the run .* got none"):
        processes(2).run(runners.shared_checkpoints, tmp_path, "none", 1, [0, 0])


def launch(
    folder: Path, processes: int, faults: list[dict[str, Any]], *options: str
) -> Callable[[str], subprocess.Popen[str]]:
    """Start a command on processes that have faults and leave notes."""
    folder.mkdir()
    settings = json.dumps({"folder": str(folder), "faults": faults})
    program = (str(Path(__file__).with_name("faulty.py")), settings)
    return lambda command: torchrun(processes, command, *options, program=program)


def notes(folder: Path) -> dict[str, dict[str, Any]]:
    """Notes of processes, by life and rank; none of the processes is left."""
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    for process in found.values():
        with pytest.raises(ProcessLookupError):
            os.kill(process["pid"], 0)
    return found


def test_torchrun_restarts_processes_that_were_killed_from_the_newest_checkpoint(
    tiny_llama: Path, text_folder: Path, tmp_path: Path
):
    command = train_command("scale", tiny_llama, text_folder, tmp_path, tokens=6144)
    faults = [
        {"rank": 1, "tokens": 2304, "kind": "kill"},
        {"rank": 0, "life": 1, "tokens": 3328, "kind": "killed while saving"},
    ]
    start = launch(tmp_path / "notes", 2, faults, "--max-restarts=2")
    finish(start(f"{command} --n_checkpoints 3"))
    found = notes(tmp_path / "notes")
    for life, (first, end) in enumerate([(0, 2560), (1792, 3328), (1792, 6144)]):
        for rank in (0, 1):
            tokens = found[f"{life}-{rank}"]["tokens"]
            assert tokens == list(range(first, end, 256))
    assert [found[f"2-{rank}"]["status"] for rank in (0, 1)] == [0, 0]
    # None that is not whole, nor what the killed process has written of one.
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert {path.name for path in folder.iterdir()} == {"1792", "3328", "4864"}
    command = train_command("scale", tiny_llama, text_folder, tmp_path / "one", 6144)
    assert (
        main([*command.split(), "--resume_from_checkpoint", str(folder / "3328")]) == 0
    )
    for sae in (tmp_path / "sae", tmp_path / "one" / "sae"):
        assert SAE.load_from_disk(sae)(torch.randn(3, 32)).isfinite().all()


def test_a_process_that_hangs_ends_all_with_an_error(
    tiny_llama: Path, text_folder: Path, tmp_path: Path
):
    command = train_command("scale", tiny_llama, text_folder, tmp_path)
    faults = [{"rank": 1, "tokens": 7168, "kind": "hang"}]
    start = launch(tmp_path / "notes", 2, faults, "--shutdown-timeout=1")
    _, err = finish(start(f"{command} --process_timeout 15"), status=1)
    found = notes(tmp_path / "notes")
    assert found["0-0"]["status"] == 1
    assert "status" not in found["0-1"]
    assert "Timed out waiting 15000ms" in err
    assert [path.name for path in checkpoints(tmp_path)] == ["6400"]
    assert not (tmp_path / "sae").exists()


def test_interrupted_processes_save_one_checkpoint_that_any_number_goes_on_from(
    tiny_llama: Path, text_folder: Path, trained_on_one: Path, tmp_path: Path
):
    def resume(processes: int, start: Path, folder: Path, faults: Any) -> Any:
        command = train_command("scale", tiny_llama, text_folder, folder)
        command += f" --resume_from_checkpoint {start} --n_checkpoints 0"
        folder.mkdir()
        return launch(folder / "notes", processes, faults)(command)

    # Signals to the processes, at different steps, and more while they save.
    (start,) = checkpoints(trained_on_one)
    faults = [
        {"rank": 0, "tokens": 7168, "kind": "term"},
        *({"rank": r, "tokens": 7424, "kind": "signal while saving"} for r in (0, 1)),
    ]
    _, err = finish(resume(2, start, tmp_path / "a", faults), status=1)
    (start,) = checkpoints(tmp_path / "a")
    assert start.name == "7424"
    assert f"interrupted; resume_from_checkpoint {start} goes on from here" in err
    found = notes(tmp_path / "a" / "notes")
    assert [process["status"] for process in found.values()] == [130, 130]

    # A signal to torchrun, on as many processes.
    faults = [
        {"rank": 0, "tokens": 8192, "kind": "term torchrun"},
        *({"rank": 1, "tokens": t, "kind": "late"} for t in range(8192, 12288, 256)),
    ]
    _, err = finish(resume(2, start, tmp_path / "b", faults), status=1)
    (start,) = checkpoints(tmp_path / "b")
    assert 8192 < int(start.name) < 12288
    assert f"interrupted; resume_from_checkpoint {start} goes on from here" in err
    found = notes(tmp_path / "b" / "notes")
    assert [process["status"] for process in found.values()] == [130, 130]
    for process in found.values():
        assert process["tokens"] == list(range(7424, int(start.name), 256))

    # On another number, and on one.
    finish(resume(3, start, tmp_path / "c", []))
    for process in notes(tmp_path / "c" / "notes").values():
        assert process["tokens"][0] == int(start.name)
    command = train_command("scale", tiny_llama, text_folder, tmp_path / "d")
    assert main([*command.split(), "--resume_from_checkpoint", str(start)]) == 0
    for folder in ("c", "d"):
        assert SAE.load_from_disk(tmp_path / folder / "sae").cfg.d_sae == 128

"""The benchmark commands, at sizes that mean nothing."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, BENCHMARKS / name, *map(str, arguments)]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    return done.stdout


def test_speed_measures_every_part_and_leaves_the_other_parts_alone(tmp_path: Path):
    output, plot = tmp_path / "speed.json", tmp_path / "scaling.png"
    output.write_text('{"other": 1}')
    parts = ("step", "inference", "scaling", "memory")
    shown = run(
        "speed.py", "--quick", "--parts", *parts, "--output", output, "--plot", plot
    )
    assert "scale 64/2" in shown and "TopK" in shown
    record = json.loads(output.read_text())
    assert set(record) == {"other", *parts} and record["other"] == 1
    laps = record["step"]["results"]["main"]["scale 64/2"]["laps"]
    assert all(wall > 0 for lap in laps.values() for wall in lap["wall"])
    assert plot.stat().st_size > 10_000


def test_training_says_what_each_part_of_a_step_takes(tmp_path: Path):
    output = tmp_path / "training.json"
    tiny = ("--steps", 2, "--batch_size", 64, "--saes", "scale")
    shown = run("training.py", *tiny, "--output", output)
    assert "language model and data" in shown
    record = json.loads(output.read_text())
    for parts in (record["scale"], record["scale, fused Adam"]):
        whole = parts.pop("whole")
        assert min(parts.values()) > 0
        assert abs(sum(parts.values()) - whole) < 1e-6 * whole

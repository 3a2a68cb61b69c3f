"""The benchmark commands, at sizes that mean nothing, and the formulas of the cost on many GPUs."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm.auto import tqdm

from benchmarks.cost_model import (
    Assumptions,
    Layout,
    Shape,
    best_layout,
    efficiency,
    fits,
    memory_bytes,
    multiply_adds,
    seconds,
    wire_bytes,
)
from benchmarks.processes import Item, Part, Record, run_together
from reproduction.flops import flops_per_token
from sae_lens_scale import ScaleTrainingSAEConfig

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
SHAPE = Shape(d_in=32, d_sae=512, num_experts=16, experts_per_token=3, k=4)
MILLION = Shape(d_in=4096, d_sae=1 << 20, num_experts=1024, experts_per_token=4, k=64)


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
    labels = ("scale", "scale, fused Adam", "scale, fused Adam, from cache")
    assert tuple(record["results"]) == labels
    for parts in record["results"].values():
        whole = parts.pop("whole")
        assert min(parts.values()) > 0
        assert abs(sum(parts.values()) - whole) < 1e-6 * whole


def test_pages_have_the_tables_of_the_records(tmp_path: Path):
    page = (ROOT / "docs/performance.md").read_text()
    again = tmp_path / "performance.md"
    again.write_text(
        re.sub(
            r"(<!-- table [\w-]+ -->).*?<!-- end -->",
            r"\1<!-- end -->",
            page,
            flags=re.S,
        )
    )
    run("tables.py", again)
    assert again.read_text() == page
    cost = re.search(r"<!-- table cost -->(.*?)<!-- end -->", page, re.S)
    assert cost and cost[1] in (ROOT / "README.md").read_text()


WRONG = """
from sae_lens_scale.ops import triton_backend

exact = triton_backend.sampled_products
triton_backend.sampled_products = lambda *factors: 1.001 * exact(*factors)
"""
GPU_PARTS = {
    "products, float32": 8,
    "steps, autocast": 7,
    "machine": 1,
    "times, autocast": 3,
    "profile": 4,
    "kernels": 7,
    "large": 2,
}


def gpu(*arguments: object, **environment: object) -> "subprocess.Popen[str]":
    """The GPU benchmark's command, started, in an environment with these variables too."""
    return subprocess.Popen(
        [sys.executable, BENCHMARKS / "gpu.py", *map(str, arguments)],
        env=os.environ | {name: str(value) for name, value in environment.items()},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_gpu_goes_on_where_it_was_killed_and_reports_a_wrong_kernel(tmp_path: Path):
    # Python imports this module when it starts.
    (tmp_path / "sitecustomize.py").write_text(WRONG)
    output = tmp_path / "gpu.json"
    parts = [*GPU_PARTS]
    command = ("--quick", "--device", "cpu", "--output", output, "--parts", *parts)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {"PYTHONPATH": paths, "TRITON_INTERPRET": 1}
    process = gpu(*command, **environment)
    while not output.exists() or not json.loads(output.read_text())["complete"]:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    before = json.loads(output.read_text())
    process = gpu(*command, **environment)
    shown, _ = process.communicate()
    assert process.returncode == 1, "a check has failed"
    record = json.loads(output.read_text())
    assert record["results"][parts[0]] == before["results"][parts[0]]
    assert record["complete"] == parts
    assert {name: len(record["results"][name]) for name in parts} == GPU_PARTS
    failed = {
        check["check"]
        for items in record["results"].values()
        for item in items.values()
        for check in item.get("checks", [])
        if check["error"] > check["bound"]
    }
    # The wrong product, and gradients that it is.
    assert failed == {
        "sampled_products, result",
        "sparse_decode, gradient 1",
        "latent_sums, gradient 1",
        "transposed_latent_sums, gradient 1",
    }
    assert "products, float32: 4/2, sampled_products, result: error " in shown
    assert "| not measured |" in shown and "| tf32 |" in shown
    text = output.read_text()
    assert '"error": "' not in text, "everything ran"
    assert "Triton" in record["results"]["kernels"]["latent_sums, 4/2, float32"]


def test_gpu_refuses_a_device_that_torch_does_not_know():
    _, errors = gpu("--device", "nonsense").communicate()
    assert errors == "gpu.py: error: device must be one of torch's, got nonsense\n"


def test_gpu_ends_at_once_without_a_gpu():
    process = gpu(CUDA_VISIBLE_DEVICES="")
    shown, complaint = process.communicate()
    assert process.returncode == 1 and shown == ""
    assert complaint == (
        f"gpu.py: error: device must be a GPU that torch {torch.__version__} sees, got "
        "cuda; a dry run is --quick --device cpu\n"
    )


def faulty(_: None) -> Iterator[Item]:
    def fail() -> dict[str, Any]:
        raise ValueError("no number\nat all")

    yield "fine", lambda: {"value": 1}
    yield "fatal", lambda: os._exit(3)
    yield "wrong", fail
    yield "slow", lambda: time.sleep(60) or {}


def broken(_: None) -> Iterator[Item]:
    os._exit(4)
    yield "never", dict


def test_a_process_that_dies_costs_one_measurement():
    record = Record({}, [], lambda: None)
    parts = [Part("faulty", faulty, seconds=4), Part("broken", broken, seconds=30)]
    deadline = time.monotonic() + 30
    with tqdm(disable=True) as bar:
        run_together(parts, None, record, get_context("fork"), deadline, bar)
    results = record.results["faulty"]
    assert results.pop("fine")["value"] == 1
    assert {name: result["error"] for name, result in results.items()} == {
        "fatal": "the process ended with exit code 3",
        "wrong": "ValueError: no number",
        "slow": "not done when the part's 4 s were over",
    }
    ended = {"error": "the process ended with exit code 4"}
    assert record.results["broken"] == {"start": ended}
    assert record.complete == ["broken"]


@pytest.fixture
def gpu_report(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, which finds its neighbours as the command does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__("gpu_report")


def test_goals_have_a_verdict_each(gpu_report: Any):
    def steps(milliseconds: float, tokens_per_second: float) -> dict[str, Any]:
        return {
            "both": {"median": milliseconds / 1e3},
            "tokens_per_second": tokens_per_second,
            "least_bytes": 4e9,
            "flops": 1e12,
        }

    results = {
        "machine": {
            "ceilings": {
                "copy": {"per_second": 4e12},
                "bfloat16 matmul": {"per_second": 8e14},
            }
        },
        "times, autocast": {
            "steps, narrow": {
                "scale 256/8": steps(3, 1e6),
                "scale 256/8, Multi-TopK": steps(4, 191_999),
                "TopK 768": steps(2, 1e6),
                "TopK 768, 5% dead": steps(1, 1e6),
            },
            "steps, wide": {
                "TopK 24,576, dense activations": steps(40, 1e5),
                "TopK 24,576, sparse activations": steps(29, 1e5),
            },
        },
        "profile": {
            "host synchronisations, 0% dead": {
                "measured": True,
                "synchronisations": [],
            },
            "kernels, tf32": {"calls": {"cudaStreamSynchronize": 2.0}},
        },
    }
    rows = [row for row in gpu_report.goals(results) if row["measured"] != "-"]
    assert [(row["measured"], row["verdict"]) for row in rows] == [
        ("191,999", "missed"),
        # 29 / 3, of the faster one, and 3 / 2.
        ("9.7", "missed"),
        ("1.50", "reached"),
        # Computing takes longer than moving the bytes: 1.25 ms of 3.
        ("0.42", "missed"),
        # Torch noticed none.
        ("2", "missed"),
    ]
    assert len(gpu_report.goals({})) == 13
    assert {row["verdict"] for row in gpu_report.goals({})} == {"not measured"}


@pytest.mark.slow
def test_caching_times_writing_and_reading(tmp_path: Path):
    output = tmp_path / "caching.json"
    # SAELens caches whole batches of the language model.
    tiny = ("--tokens", 2_048, "--batch_size", 512, "--rounds", 1)
    shown = run("caching.py", *tiny, "--output", output)
    assert "cache, SAELens, shuffle" in shown
    record = json.loads(output.read_text())
    assert record["tokens"].keys() == record["results"].keys()
    # Special tokens are not among them.
    assert 2_048 <= record["tokens"]["cache"] < 2_048 + 128


def table(text: str) -> list[dict[str, str]]:
    """Rows, by the head, of the Markdown table that has a column "layout"."""
    tables = [part.strip().splitlines() for part in text.split("\n\n")]
    (lines,) = (t for t in tables if t[0].startswith("|") and "layout" in t[0])
    head, _, *rows = ([c.strip() for c in line.split("|")[1:-1]] for line in lines)
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_scaling_prints_and_draws_the_costs_that_the_page_has(tmp_path: Path):
    picture = tmp_path / "scale-out.png"
    printed = table(run("scaling.py", "--output", picture))
    stated = table((ROOT / "docs/scale-out.md").read_text())
    assert len(stated) == 3 * 3 * 3
    assert stated == [{name: row[name] for name in stated[0]} for row in printed]
    assert picture.stat().st_size > 10_000


def test_scaling_refuses_lists_that_do_not_fit_in_one_line():
    command = [sys.executable, BENCHMARKS / "scaling.py", "--k", "32"]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "scaling.py: error: k must have as many numbers as d_in=[768, 4096, 16384], "
        "got [32]\n"
    )


@pytest.mark.parametrize(
    ("assumption", "complaint"),
    [
        ({"overlap": 2}, "overlap must be from 0 to 1, got 2"),
        ({"link_share": 0}, "link_share must be above 0 and at most 1, got 0"),
        ({"latency": -1}, "latency must be at least 0 and finite, got -1"),
        ({"tokens": 0}, "tokens must be at least 1 and finite, got 0"),
    ],
)
def test_cost_model_refuses_what_makes_no_sense(
    assumption: dict[str, Any], complaint: str
):
    with pytest.raises(ValueError, match=f"^{complaint}$"):
        Assumptions(**assumption)
    with pytest.raises(ValueError, match="^ranks must divide gpus=8, got 3$"):
        Layout("experts", 8, 3)
    with pytest.raises(ValueError, match="^d_sae must be a multiple of num_experts=3"):
        replace(SHAPE, num_experts=3)


@pytest.mark.parametrize("multi_topk", [False, True])
@pytest.mark.parametrize("dead", [0.0, 0.25])
def test_cost_model_counts_the_flops_of_the_laboratory(multi_topk: bool, dead: float):
    matrix, rows = multiply_adds(SHAPE, Assumptions(multi_topk=multi_topk, dead=dead))
    cfg = ScaleTrainingSAEConfig(
        **vars(SHAPE), num_shared_experts=0, multi_topk_coefficient=float(multi_topk)
    )
    flops = flops_per_token(cfg, dead_latents=int(dead * SHAPE.expert_size))
    assert 2 * SHAPE.d_in * (matrix + rows) == flops.total


@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_wire_bytes_are_those_of_tokens_that_choose_experts_evenly(ranks: int):
    tokens, element = 2048, 2
    settings = Assumptions(tokens=tokens, bytes_per_element=element, dead=0.75)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(ranks, tokens, SHAPE.num_experts, generator=generator)
    owner_of = torch.arange(SHAPE.num_experts) * ranks // SHAPE.num_experts
    owner = owner_of[scores.topk(SHAPE.experts_per_token).indices]
    home = torch.arange(ranks).view(-1, 1, 1)
    pairs = (owner != home).sum().item() / ranks
    has = torch.stack([(owner == rank).any(-1) for rank in range(ranks)], dim=-1)
    rows = (has & (torch.arange(ranks) != home)).sum().item() / ranks
    vector = SHAPE.d_in * element
    # Of a pair: the best 4 k = 16 of its latents, and the best d_in / 2 = 16 of its 24 dead ones.
    want = {
        "tokens to owners": rows * vector + pairs * (8 + 4),
        "ranking values": pairs * (16 + 16) * 4,
        "prefixes": pairs * 3 * 4,
        "reconstructions": rows * 3 * vector,
        "reconstructions' gradients": rows * 3 * vector,
        "gates' gradients": pairs * 4,
    }
    got = wire_bytes(SHAPE, Layout("experts", ranks, ranks), settings)
    assert {name: got[name] for name in want} == pytest.approx(want, rel=0.03)
    assert got["gradients of weights"] == 0
    summed = 2 * (ranks - 1) / ranks * 4 * (32 * (16 + 2) + 512)
    assert got["router and firing counts"] == pytest.approx(summed)


def test_experts_of_one_rank_are_data_parallel():
    settings = Assumptions()
    data, experts = (Layout(kind, 64, 1) for kind in ("data", "experts"))
    for cost in (wire_bytes, memory_bytes, seconds):
        assert cost(MILLION, experts, settings) == cost(MILLION, data, settings)
    sent = wire_bytes(MILLION, data, settings)
    # Each parameter's gradient and sum in float32, of 63 of 64 ranks, and how often a latent fired.
    numbers = MILLION.expert_parameters + MILLION.other_parameters + MILLION.d_sae
    assert sum(sent.values()) == pytest.approx(2 * 63 / 64 * 4 * numbers)


def test_weights_and_their_gradients_are_shared_out_among_ranks():
    settings = Assumptions(sharded_adam=False)
    layout = Layout("experts", 64, 16)
    alone = memory_bytes(MILLION, Layout("data", 64, 1), settings)
    shared = memory_bytes(MILLION, layout, settings)
    for name in ("weights", "gradients", "Adam"):
        assert 1 / 16 < shared[name] / alone[name] < 1.01 / 16
    less = memory_bytes(MILLION, layout, replace(settings, sharded_adam=True))
    assert less["Adam"] == pytest.approx(shared["Adam"] / 4)


def test_the_fastest_layout_of_those_that_fit_is_chosen():
    settings = Assumptions()
    best = best_layout(MILLION, "experts", 64, settings)
    times = {
        ranks: seconds(MILLION, Layout("experts", 64, ranks), settings)["step"]
        for ranks in (2, 4, 8, 16, 32, 64)
        if fits(MILLION, Layout("experts", 64, ranks), settings)
    }
    assert best.ranks == min(times, key=lambda ranks: times[ranks])
    whole = replace(settings, sharded_adam=False)
    assert not fits(MILLION, best_layout(MILLION, "data", 64, whole), whole)


def test_one_gpu_is_efficient_and_hidden_communication_costs_nothing():
    settings = Assumptions(gpu_memory=200)
    assert efficiency(MILLION, Layout("data", 1, 1), settings) == 1
    # Computing is longer than communication here, and hides it whole.
    layout = Layout("experts", 8, 8)
    hidden = seconds(MILLION, layout, replace(settings, overlap=1.0))
    assert hidden["step"] == pytest.approx(hidden["computing"])
    assert hidden["exchange"] == seconds(MILLION, layout, settings)["exchange"] > 0


def test_bytes_to_other_nodes_take_longer():
    settings = Assumptions(latency=0)
    within = seconds(MILLION, Layout("experts", 8, 8), settings)["exchange"]
    settings = replace(settings, gpus_per_node=1)
    between = seconds(MILLION, Layout("experts", 8, 8), settings)["exchange"]
    assert between == pytest.approx(within * 450 / 50)

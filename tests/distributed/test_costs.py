"""Bytes, collectives and memory of a training step, against their formulas."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed import costs, work
from distributed.processes import Processes

from benchmarks.cost_model import Assumptions, Layout, Shape, wire_bytes

pytestmark = pytest.mark.slow

SHAPE = Shape(d_in=32, d_sae=512, num_experts=16, experts_per_token=3, k=4)
TOKENS = 512
# Purposes of the formulas, and names that they are counted under.
PURPOSES: dict[str, tuple[str, ...]] = {
    "tokens to owners": ("tokens",),
    "ranking values": ("ranking values",),
    "prefixes": ("selected",),
    "reconstructions": ("reconstructions",),
    "reconstructions' gradients": ("reconstructions, gradients",),
    "gates' gradients": ("gates, gradients",),
    "gradients of weights": ("gradients of replicas", "slices of replicas"),
    "router and firing counts": ("gradients of all processes",),
}


def overrides_of(
    shape: Shape, multi_topk: bool = False, dead_loss: bool = False, **others: Any
) -> dict[str, Any]:
    return {
        **vars(shape),
        "dtype": "float32",
        "multi_topk_coefficient": 0.125 * multi_topk,
        "aux_loss_coefficient": 0.125 * dead_loss,
        **others,
    }


@pytest.mark.parametrize(
    ("multi_topk", "dead"), [(False, 0.0), (True, 0.0), (False, 0.125), (True, 0.75)]
)
@pytest.mark.parametrize(
    ("size", "expert_parallel"),
    [(2, 1), (4, 1), (2, 2), (3, 3), (4, 2), (4, 4)],
)
def test_bytes_are_those_of_the_formulas(
    processes: Callable[[int], Processes],
    size: int,
    expert_parallel: int,
    multi_topk: bool,
    dead: float,
):
    settings = Assumptions(
        tokens=TOKENS,
        dead=dead,
        multi_topk=multi_topk,
        bytes_per_element=4,
    )
    kind = "data" if expert_parallel == 1 else "experts"
    want = wire_bytes(SHAPE, Layout(kind, size, expert_parallel), settings)
    overrides = overrides_of(SHAPE, multi_topk, dead > 0)
    results = processes(size).run(
        costs.cost_of_step, overrides, TOKENS, expert_parallel, dead
    )
    sent: Counter[str] = sum((r["sent"] for r in results), Counter())
    got = {
        purpose: sum(sent[name] for name in names) / size
        for purpose, names in PURPOSES.items()
    }
    assert got == pytest.approx(want, rel=0.1)
    # Numbers of tokens for each owner, loads and the norm are small.
    assert sum(sent.values()) / size == pytest.approx(sum(want.values()), rel=0.1)


@pytest.mark.parametrize("multi_topk", [False, True])
def test_shared_experts_travel_no_more_than_none(
    processes: Callable[[int], Processes], multi_topk: bool
):
    n = SHAPE.expert_size
    with_shared = Shape(32, SHAPE.d_sae + 2 * n, SHAPE.num_experts + 2, 5, SHAPE.k)
    group = processes(2)
    without, shared = (
        group.run(
            costs.cost_of_step,
            overrides_of(shape, multi_topk, num_shared_experts=num_shared),
            TOKENS,
            2,
        )
        for shape, num_shared in ((SHAPE, 0), (with_shared, 2))
    )
    for (name,) in list(PURPOSES.values())[:6]:
        want = sum(r["sent"][name] for r in without)
        assert sum(r["sent"][name] for r in shared) == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize(
    ("multi_topk", "dead"), [(False, 0.0), (True, 0.0), (False, 0.125), (True, 0.75)]
)
def test_all_that_a_step_learns_from_travels_together(
    processes: Callable[[int], Processes], multi_topk: bool, dead: float
):
    overrides = overrides_of(SHAPE, multi_topk, dead > 0)
    results = processes(2).run(costs.cost_of_step, overrides, 64, 2, dead)
    calls = [result["calls"] for result in results]
    assert calls[0] == calls[1] and calls[0].total() == 10


@pytest.mark.parametrize(("expert_parallel", "number"), [(1, 5), (2, 12)])
def test_collectives_of_replicas(
    processes: Callable[[int], Processes], expert_parallel: int, number: int
):
    results = processes(4).run(
        costs.cost_of_step, overrides_of(SHAPE), 64, expert_parallel
    )
    assert {result["calls"].total() for result in results} == {number}


@pytest.mark.parametrize("num_shared", [0, 1])
@pytest.mark.parametrize("expert_parallel", [2, 4])
def test_memory_is_shared_out_with_the_experts(
    processes: Callable[[int], Processes], expert_parallel: int, num_shared: int
):
    num_experts = 64 + num_shared
    shape = Shape(32, 64 * num_experts, num_experts, experts_per_token=3, k=4)
    overrides = overrides_of(shape, True, True, num_shared_experts=num_shared)
    results = processes(4).run(
        costs.cost_of_step, overrides, 64, expert_parallel, 0.125
    )
    of_shared = shape.expert_parameters * num_shared / num_experts
    whole = shape.expert_parameters + shape.other_parameters
    replicated = (of_shared + shape.other_parameters) / whole
    most = 1.05 * ((1 - replicated) / expert_parallel + replicated)
    one = costs.state_bytes_of_one(overrides)
    assert one == 4 * 4 * whole
    # Replicas share out gradients and Adam's moments besides.
    assert all(0.5 * most * one < r["memory"] <= most * one for r in results)


@pytest.mark.parametrize("dead", [0.0, 0.75])
def test_an_owner_of_all_tokens_holds_no_more_where_they_have_more_experts(
    processes: Callable[[int], Processes], dead: float, tmp_path: Path
):
    peaks = []
    for experts_per_token in (2, 8):
        shape = Shape(256, 1024, 16, experts_per_token, k=4)
        overrides = overrides_of(shape, True, True)
        arguments = (costs.memory_of_owners, overrides, 1024, dead, tmp_path)
        peaks.append(processes(2).run(work.in_parts, 1 << 16, *arguments)[1])
    # Beside inputs and reconstructions, little for each pair: its best latents' ranking. Threads
    # of the collectives free an eighth of it sooner or later.
    of_inputs = 2 * 1024 * 256 * 4
    assert peaks[1] < 1.5 * peaks[0] < 1.5 * 16 * of_inputs


def test_only_the_first_process_makes_a_whole_sae(
    processes: Callable[[int], Processes], tmp_path: Path
):
    shape = Shape(128, 1 << 16, 512, experts_per_token=2, k=4)
    results = processes(2).run(costs.memory_of_start, overrides_of(shape), tmp_path)
    for weights, peak in results:
        assert weights <= peak < 1.3 * weights


def test_no_process_holds_a_whole_checkpoint(
    processes: Callable[[int], Processes], tmp_path: Path
):
    shape = Shape(256, 1 << 16, 512, experts_per_token=2, k=4)
    results = processes(2).run(
        costs.memory_of_checkpoints, overrides_of(shape, True, True), tmp_path
    )
    for weights, saving, loading in results:
        # A whole would be six times the part's weights, Adam's moments included.
        assert saving < 0.5 * weights
        # The part's own moments stay.
        assert loading < 2.25 * weights

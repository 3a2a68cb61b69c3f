"""Training on several processes against SAELens's trainer on one."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from distributed import work
from distributed.processes import Processes

RECIPE = {
    "k": 3,
    "multi_topk_coefficient": 1 / 8,
    "aux_loss_coefficient": 1 / 4,
    "router_lr_factor": 1 / 8,
}
STARTING = RECIPE | {"initialize_from_activations": True}


def assert_same_training(
    of_size: Callable[[int], Processes],
    size: int,
    expert_parallel: int,
    architecture: str = "scale",
    overrides: dict[str, Any] = RECIPE,
    trainer: dict[str, Any] | None = None,
    sizes: Sequence[int] | None = None,
    tolerance: float = 1e-10,
) -> None:
    one = work.train_on_one(architecture, overrides, trainer or {})
    results = of_size(size).run(
        work.train, architecture, overrides, trainer or {}, expert_parallel, sizes
    )
    dead = [logged["sparsity/dead_features"] for logged in one["logged"]]
    assert any(dead), "some latents should be dead at times"
    for result in results:
        assert result["samples"] == one["samples"]
        assert torch.equal(result["since_fired"], one["since_fired"])
        assert torch.equal(result["frequency"], one["frequency"])
        for got, want in zip(result["logged"], one["logged"], strict=True):
            for name in want:
                if name.startswith("losses/") or name in (
                    "metrics/l0",
                    "metrics/explained_variance",
                    "metrics/explained_variance_legacy",
                    "metrics/explained_variance_legacy_std",
                    "sparsity/dead_features",
                ):
                    # SAELens takes its mean of L0 in float32.
                    near = 1e-6 if name == "metrics/l0" else 10 * tolerance
                    assert got[name] == pytest.approx(want[name], rel=near, abs=near)
    assert [result["weights"] is None for result in results[1:]] == [True] * (size - 1)
    for name, want in one["weights"].items():
        got = results[0]["weights"][name]
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_gradients_are_clipped_to_norm_1_also_where_their_square_overflows(
    processes: Callable[[int], Processes], dtype: str, expert_parallel: int
):
    for before, after in processes(2).run(
        work.norm_after_clipping, dtype, expert_parallel
    ):
        assert before**2 > torch.finfo(torch.float16).max
        assert after == pytest.approx(1, rel=0.01)


# Replicas, shared out experts, of which there are five, and both.
MESHES = [(2, 1), (2, 2), (3, 1), (3, 3), (4, 1), (4, 4)]


@pytest.mark.parametrize("architecture", ["scale", "switch"])
def test_two_replicas_of_two_parts_train_as_one_process(
    processes: Callable[[int], Processes], architecture: str
):
    assert_same_training(processes, 4, 2, architecture)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "expert_parallel"), MESHES)
@pytest.mark.parametrize("architecture", ["scale", "switch"])
def test_thirty_steps_are_those_of_one_process(
    processes: Callable[[int], Processes],
    size: int,
    expert_parallel: int,
    architecture: str,
):
    assert_same_training(processes, size, expert_parallel, architecture)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        RECIPE | {"experts_per_token": 3, "num_shared_experts": 1},
        RECIPE | {"normalize_activations": "expected_average_only_in"},
        RECIPE | {"normalize_activations": "covariance_whitening"},
        STARTING,
    ],
    ids=str,
)
@pytest.mark.parametrize(("size", "expert_parallel"), [(3, 1), (2, 2), (4, 2)])
def test_shared_experts_normalisation_and_start_are_of_the_whole_batch(
    processes: Callable[[int], Processes],
    size: int,
    expert_parallel: int,
    overrides: dict[str, Any],
):
    # SAELens sums norms in float32.
    assert_same_training(
        processes, size, expert_parallel, overrides=overrides, tolerance=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize(("size", "expert_parallel"), [(3, 3), (4, 2)])
def test_in_float32(
    processes: Callable[[int], Processes], size: int, expert_parallel: int
):
    assert_same_training(
        processes,
        size,
        expert_parallel,
        overrides=RECIPE | {"dtype": "float32"},
        tolerance=1e-5,
    )


@pytest.mark.slow
@pytest.mark.parametrize("expert_parallel", [1, 3])
def test_uneven_shards_and_a_process_without_tokens(
    processes: Callable[[int], Processes], expert_parallel: int
):
    assert_same_training(processes, 3, expert_parallel, sizes=[50, 46, 0])

"""SAEs on several processes against the same SAE on one."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from distributed import work
from distributed.processes import Processes
from helpers import DEAD, draw, step_input

from sae_lens_scale.distributed.ownership import EXPERT_DIMENSIONS

X = draw(24, 10, seed=1)
DEFAULT = {"multi_topk_coefficient": 0.5, "aux_loss_coefficient": 0.25}


def assert_as_one_process(
    of_size: Callable[[int], Processes],
    size: int,
    expert_parallel: int,
    architecture: str = "scale",
    overrides: dict[str, Any] | None = None,
    x: torch.Tensor = X,
    dead: torch.Tensor | None = DEAD,
    sizes: Sequence[int] | None = None,
    at_a_time: int = 1 << 24,
) -> list[dict[str, Any]]:
    overrides = DEFAULT | (overrides or {})
    sae = work.MAKERS[architecture](**overrides)
    output = sae.training_forward_pass(step_input(x, dead))
    output.loss.backward()
    step = (architecture, overrides, x, dead, expert_parallel, sizes)
    results = of_size(size).run(work.in_parts, at_a_time, work.training_step, *step)
    torch.testing.assert_close(
        torch.cat([r["sae_out"] for r in results]),
        output.sae_out.detach(),
        rtol=1e-10,
        atol=1e-10,
    )
    for name, loss in output.losses.items():
        total = torch.stack([r["losses"][name] for r in results]).sum()
        torch.testing.assert_close(total, loss.detach(), rtol=1e-10, atol=1e-10)
    for name, parameter in sae.named_parameters():
        whole = torch.zeros_like(parameter)
        for result in results:
            part = result["gradients"][name]
            if part is None:
                continue
            if name in EXPERT_DIMENSIONS:
                dim, held = EXPERT_DIMENSIONS[name], torch.tensor(result["held"])
                experts = whole.unflatten(dim, (sae.cfg.num_experts, -1))
                part = part.unflatten(dim, (len(held), -1))
                experts.index_add_(dim, held, part)
            else:
                whole += part
        want = torch.zeros_like(whole) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(
            whole, want, msg=lambda m, n=name: f"{n}: {m}", rtol=1e-10, atol=1e-10
        )
    return results


PLAIN = {"multi_topk_coefficient": 0.0, "aux_loss_coefficient": 0.0}
MESHES = [(2, 1), (2, 2), (3, 3)]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"topk_over": "activations", "gate": "softmax"},
    {"gate": "double_softmax"},
    {"gate": "uniform"},
    {"gate": "renormalized"},
    {"experts_per_token": 3, "num_shared_experts": 1},
    {"rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": False},
    {"feature_scaling": False},
    {"decomposition": "identity"},
    {"decomposition": "learned"},
    {"experts_per_token": 1},
    {"normalize_activations": "layer_norm", **PLAIN},
    {"normalize_activations": "constant_norm_rescale", **PLAIN},
    {"k": 24},
    {"k": 1},
    PLAIN,
    {"load_balance_coefficient": 0.0},
]


@pytest.mark.parametrize("overrides", SETTINGS, ids=str)
@pytest.mark.parametrize(
    ("size", "expert_parallel"),
    [(4, 2), *(pytest.param(n, e, marks=pytest.mark.slow) for n, e in MESHES)],
)
def test_losses_and_gradients_are_those_of_one_process(
    processes: Callable[[int], Processes],
    size: int,
    expert_parallel: int,
    overrides: dict[str, Any],
):
    assert_as_one_process(processes, size, expert_parallel, overrides=overrides)


@pytest.mark.slow
@pytest.mark.parametrize("expert_parallel", [1, 2, 4])
@pytest.mark.parametrize("architecture", ["scale", "switch"])
@pytest.mark.parametrize("dead", [None, torch.zeros(60).bool(), torch.ones(60).bool()])
def test_four_processes_as_replicas_experts_and_both(
    processes: Callable[[int], Processes],
    expert_parallel: int,
    architecture: str,
    dead: torch.Tensor | None,
):
    assert_as_one_process(processes, 4, expert_parallel, architecture, dead=dead)


@pytest.mark.slow
@pytest.mark.parametrize("expert_parallel", [1, 3])
@pytest.mark.parametrize("sizes", [[24, 0, 0], [0, 1, 23], [8, 7, 9]], ids=str)
def test_processes_may_have_other_numbers_of_tokens_or_none(
    processes: Callable[[int], Processes], expert_parallel: int, sizes: list[int]
):
    assert_as_one_process(processes, 3, expert_parallel, sizes=sizes)


@pytest.mark.parametrize("size", [2, 3])
def test_one_owner_of_all_tokens_experts(
    processes: Callable[[int], Processes], size: int
):
    results = assert_as_one_process(processes, size, size, "one owner")
    pairs = [result["sent"].get("gates, gradients", 0) for result in results]
    # Of 24 tokens, two experts each; float64. The owner sends back all but its own.
    assert pairs == [0] * (size - 1) + [(24 - 24 // size) * 2 * 8]


@pytest.mark.parametrize(
    "dead", [None, DEAD, torch.ones(60).bool()], ids=["none", "some", "all"]
)
@pytest.mark.parametrize("pairs_at_a_time", [1, 7])
def test_owners_that_compute_in_parts_compute_the_same(
    processes: Callable[[int], Processes],
    pairs_at_a_time: int,
    dead: torch.Tensor | None,
):
    overrides = {"experts_per_token": 3, "num_shared_experts": 1}
    # Experts are wider than inputs: they have 12 latents.
    at_a_time = 12 * pairs_at_a_time
    assert_as_one_process(
        processes, 2, 2, overrides=overrides, dead=dead, at_a_time=at_a_time
    )


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("scale", {}),
        ("scale", {"experts_per_token": 3, "num_shared_experts": 1}),
        ("scale", {"rescale_acts_by_decoder_norm": False}),
        ("switch", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [2, 3])
def test_inference_is_that_of_one_process(
    processes: Callable[[int], Processes],
    size: int,
    architecture: str,
    overrides: dict[str, Any],
):
    sae = work.MAKERS[architecture](**overrides)
    results = processes(size).run(work.inference, architecture, overrides, X, size)
    acts, decoded, forward = (torch.cat(parts) for parts in zip(*results, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(acts, sae.encode(X), rtol=1e-10, atol=1e-10)
        want = sae.decode(acts)
        torch.testing.assert_close(decoded, want, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(forward, want, rtol=1e-10, atol=1e-10)


def test_omegas_that_are_logged_are_those_of_all_experts(
    processes: Callable[[int], Processes],
):
    overrides = {"experts_per_token": 3, "num_shared_experts": 1}
    metrics, histogram = work.omegas_logged(overrides, X)
    assert len(set(histogram)) == 5 and len(metrics) == 3
    for got, values in processes(2).run(work.omegas_logged, overrides, X, 2):
        assert got == pytest.approx(metrics)
        assert values == histogram


@pytest.mark.parametrize(
    "normalize_activations", ["expected_average_only_in", "covariance_whitening"]
)
def test_omegas_on_record_once_folded_are_those_of_all_experts(
    processes: Callable[[int], Processes], normalize_activations: str
):
    results = processes(2).run(work.omegas_of_folded, normalize_activations, 2)
    (omegas, on_record), (_, nothing) = results
    assert nothing is None
    assert on_record == omegas


@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_a_subclass_keeps_the_first_processs_layers_and_buffers(
    processes: Callable[[int], Processes], expert_parallel: int
):
    results = processes(2).run(work.whole_of_subclass, expert_parallel)
    (before, whole), (other, nothing) = results
    assert nothing is None
    assert not torch.equal(before["numbers"], other["numbers"])
    torch.testing.assert_close(whole, before, rtol=0, atol=0)


def test_a_process_without_tokens_decodes_with_the_others(
    processes: Callable[[int], Processes],
):
    x, sae = X[:1], work.MAKERS["scale"]()
    (acts, decoded, _), nothing = processes(2).run(work.inference, "scale", {}, x, 2)
    with torch.no_grad():
        torch.testing.assert_close(decoded, sae.decode(acts), rtol=1e-10, atol=1e-10)
    assert [tensor.shape for tensor in nothing] == [(0, 60), (0, 10), (0, 10)]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_rounding_is_that_of_one_process(
    processes: Callable[[int], Processes], expert_parallel: int, dtype: str
):
    # Large: the sum of the squared errors of the tokens is more than float16 holds.
    x = 3 * draw(48, 10, seed=1).to(torch.bfloat16).double()
    autocast = dtype == "autocast"
    name = "float32" if autocast else dtype
    overrides = DEFAULT | {"dtype": name, "router_lr_factor": 1.0}
    one, exact = (
        work.MAKERS["scale"](**overrides | {"dtype": d}) for d in (name, "float64")
    )
    exact.load_state_dict(one.state_dict())
    outputs = []
    for sae, given in ((one, x.to(one.dtype)), (exact, x)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and sae is one):
            output = sae.training_forward_pass(step_input(given, DEAD))
        output.loss.backward()
        outputs.append(output)
    results = processes(2).run(
        work.training_step,
        "scale",
        overrides,
        x.to(one.dtype),
        DEAD,
        expert_parallel,
        None,
        autocast,
    )
    # Each sum is rounded where one process rounds, and where results of two are added.
    eps = torch.finfo(torch.float16 if dtype == "float16" else torch.bfloat16).eps
    out = torch.cat([r["sae_out"] for r in results])
    for loss in outputs[1].losses:
        total = torch.stack([r["losses"][loss].double() for r in results]).sum()
        assert relative(total, outputs[1].losses[loss]) < 8 * eps
    bound = 2 * relative(outputs[0].sae_out, outputs[1].sae_out) + 2 * eps
    assert relative(out, outputs[1].sae_out) < bound
    for parameter, want in exact.named_parameters():
        if parameter in EXPERT_DIMENSIONS and expert_parallel > 1:
            continue
        got = torch.stack([r["gradients"][parameter].double() for r in results]).sum(0)
        of_one = one.get_parameter(parameter).grad
        assert relative(got, want.grad) < 2 * relative(of_one, want.grad) + 2 * eps

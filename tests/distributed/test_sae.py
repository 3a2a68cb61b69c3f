"""SAEs on several processes against the same SAE on one."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from distributed import work
from distributed.processes import Processes
from helpers import DEAD, draw, step_input

from sae_lens_scale.distributed.exchange import EXPERT_DIMENSIONS

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
) -> list[dict[str, Any]]:
    overrides = DEFAULT | (overrides or {})
    sae = work.MAKERS[architecture](**overrides)
    output = sae.training_forward_pass(step_input(x, dead))
    output.loss.backward()
    results = of_size(size).run(
        work.training_step, architecture, overrides, x, dead, expert_parallel, sizes
    )
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

"""Training of the router at a fraction of the learning rate."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DEAD, assert_close, draw, exported, step_input
from sae_lens.saes.sae import SAE, TrainingSAE

from sae_lens_scale.runner import apply_lr_factors


def adam_steps(sae: Any, steps: int, **lr_factors: float) -> None:
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    if lr_factors:
        apply_lr_factors(optimizer, sae, lr_factors)
    for i in range(steps):
        x = draw(40, 10, seed=i).to(sae.dtype)
        sae.training_forward_pass(step_input(x, DEAD)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_step_of_Adam_changes_the_router_by_the_factor(make: Any):
    sae = make(router_lr_factor=0.25, gate="softmax")
    before = copy.deepcopy(sae.state_dict())
    adam_steps(sae, 1)
    for name, share in (("W_router", 0.25), ("b_router", 0.25), ("b_dec", 1.0)):
        change = (sae.state_dict()[name] - before[name]).abs()
        assert_close(change, torch.full_like(change, share * 1e-3), atol=1e-6)


@pytest.mark.parametrize("factor", [1 / 8, 0.3])
def test_the_factor_is_a_learning_rate(make: Any, factor: float):
    sae, other = make(router_lr_factor=factor), make(router_lr_factor=1.0)
    other.load_state_dict(sae.state_dict())
    before = copy.deepcopy(sae.state_dict())
    adam_steps(sae, 10)
    adam_steps(other, 10, W_router=factor, b_router=factor)
    assert_close(sae.state_dict(), other.state_dict(), atol=1e-6)
    assert (sae.state_dict()["W_router"] - before["W_router"]).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_goes_on_from_files_as_without_them(
    make: Any, dtype: str, tmp_path: Path
):
    sae = make(dtype=dtype)
    adam_steps(sae, 3)
    sae.save_model(tmp_path)
    again: Any = TrainingSAE.load_from_disk(tmp_path)
    assert_close(dict(again.named_parameters()), dict(sae.named_parameters()), atol=0)
    adam_steps(sae, 3)
    adam_steps(again, 3)
    # A file's tensors lie elsewhere in memory, which moves the last bit of a product.
    assert_close(again.state_dict(), sae.state_dict(), atol=1e-6)


@pytest.mark.parametrize("factor", [0.3, 5.0])
def test_any_factor_leaves_exports_and_folds_as_they_are(
    make: Any, factor: float, tmp_path: Path
):
    sae, x = make(router_lr_factor=factor), draw(40, 10, seed=1)
    plain = make(router_lr_factor=1.0)
    plain.load_state_dict(sae.state_dict())
    assert_close(sae.encode(x), plain.encode(x))
    assert_close(exported(sae, tmp_path).encode(x), plain.encode(x))
    for both in (sae, plain):
        both.fold_activation_norm_scaling_factor(2.5)
    assert_close(sae.encode(x), plain.encode(x))
    whitening = draw(10, 10, seed=6)
    for both in (sae, plain):
        both.fold_activation_whitening(x[0], whitening, whitening.inverse())
    assert_close(sae.encode(x), plain.encode(x))


def test_a_later_change_of_the_factor_leaves_the_router_as_it_is(make: Any):
    sae, x = make(), draw(40, 10, seed=1)
    acts = sae.encode(x)
    sae.cfg.router_lr_factor = 1.0
    assert torch.equal(sae.encode(x), acts)


def test_state_dicts_hold_the_applied_router_and_share_nothing_with_it(make: Any):
    sae = make()
    for name, applied in zip(
        ("W_router", "b_router"), sae.applied_router(), strict=True
    ):
        held = sae.state_dict()[name]
        assert_close(held, applied.data, atol=0)
        held.zero_()
        assert getattr(sae, name).all()


def test_a_router_too_large_for_float16_is_refused(make: Any, tmp_path: Path):
    sae = make(router_lr_factor=1 / 64, dtype="float32")
    sae.b_router.data[0] = 64 * 2000
    sae.save_model(tmp_path)
    with pytest.raises(
        ValueError, match=r"float16 is too small.*router_lr_factor=0\.0"
    ):
        TrainingSAE.load_from_disk(tmp_path, dtype="float16")
    # For inference nothing is divided.
    for_inference = SAE.load_from_disk(tmp_path, dtype="float16")
    assert for_inference.b_router[0] == 2000  # type: ignore[index]


W, B = torch.ones(10, 5), torch.ones(10)


@pytest.mark.parametrize(
    ("W_router", "b_router", "message"),
    [
        (W[:, :1], B, r"W_router must have shape \(10, 5\), got \(10, 1\)"),
        (W.T, B, r"W_router must have shape \(10, 5\), got \(5, 10\)"),
        (W, B[0], r"b_router must have shape \(10,\), got \(\)"),
        (W, torch.ones(11), r"b_router must have shape \(10,\), got \(11,\)"),
    ],
    ids=["one expert", "transposed", "scalar", "wider"],
)
def test_a_router_of_another_shape_is_not_set(
    make_either: Any, W_router: torch.Tensor, b_router: torch.Tensor, message: str
):
    sae = make_either()
    before = copy.deepcopy(sae.state_dict())
    with pytest.raises(ValueError, match=message):
        sae.set_router(W_router, b_router)
    assert_close(sae.state_dict(), before, atol=0)


def test_a_router_that_torch_parametrizes_has_a_state_dict(make: Any):
    sae, twin = make(), make(seed=1)
    for either in (sae, twin):
        torch.nn.utils.parametrizations.weight_norm(either, "W_router")
    adam_steps(sae, 1)
    twin.load_state_dict(sae.state_dict())
    x = draw(40, 10, seed=1)
    assert torch.equal(twin.encode(x), sae.encode(x))

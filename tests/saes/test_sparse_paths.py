"""The compact paths are the dense ones: whatever is overridden, hooked or derived."""

from typing import Any

import pytest
import torch
from helpers import X, assert_close, gradients, scale_sae, step_input, subclass
from typing_extensions import override

from sae_lens_scale import ScaleTrainingSAE
from sae_lens_scale.saes.mixture import encoding
from sae_lens_scale.saes.mixture.extension_points import is_hooked

frozen_or_not = pytest.mark.parametrize("frozen", [True, False])


@frozen_or_not
def test_forward_is_decode_of_encode(make: Any, frozen: bool):
    sae = make().requires_grad_(not frozen)
    x = X.clone().requires_grad_()
    wide = sae.decode(sae.encode(x))
    assert_close(sae(x), wide)
    assert_close(
        torch.autograd.grad(sae(x).sin().sum(), x)[0],
        torch.autograd.grad(wide.sin().sum(), x)[0],
    )


class Doubling(ScaleTrainingSAE):
    @override
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().encode(x)


def test_forward_uses_an_encode_that_a_subclass_or_somebody_else_overrides(
    monkeypatch: pytest.MonkeyPatch,
):
    plain = scale_sae()
    sae = subclass(Doubling, plain)
    assert_close(sae(X) - sae.b_dec, 2 * (plain(X) - plain.b_dec))
    monkeypatch.setattr(plain, "decode", lambda acts: acts)
    assert_close(plain(X), plain.encode(X))


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_any_kind_of_hook_is_noticed(register: str):
    sae = scale_sae()
    assert not is_hooked(sae.hook_sae_acts_post)
    handle = getattr(sae.hook_sae_acts_post, register)(lambda *_: None)
    assert is_hooked(sae.hook_sae_acts_post)
    handle.remove()
    assert not is_hooked(sae.hook_sae_acts_post)


@frozen_or_not
@pytest.mark.parametrize("part", ["encode", "decode", "forward"])
def test_derivatives_of_every_mode_agree(make: Any, frozen: bool, part: str):
    sae = make().requires_grad_(not frozen)
    function = getattr(sae, part)
    start = sae.encode(X[:2]).detach() if part == "decode" else X[:2]
    reverse = torch.func.jacrev(function)(start)
    assert reverse.abs().max() > 0.1
    assert_close(torch.func.jacfwd(function)(start), reverse)
    direction = torch.randn_like(start)
    with torch.no_grad():
        forward = torch.func.jvp(function, (start,), (direction,))[1]
    want = reverse.flatten(0, 1).flatten(1) @ direction.flatten()
    assert_close(forward.flatten(), want)


@pytest.mark.parametrize("part", ["encode", "decode", "forward"])
@pytest.mark.parametrize("grad", [True, False])
def test_every_part_can_be_compiled(part: str, grad: bool):
    sae = scale_sae()
    function = getattr(sae, part)
    x = sae.encode(X).detach() if part == "decode" else X
    torch.compiler.reset()
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(function, backend="aot_eager")
        assert_close(compiled(x), function(x))


def test_a_training_step_with_dead_latents_can_be_compiled(sparse: bool):
    sae = scale_sae(use_sparse_activations=sparse)
    step = step_input(X, torch.arange(60) % 3 == 0)
    torch.compiler.reset()
    compiled = torch.compile(sae.training_forward_pass, backend="aot_eager")
    want = gradients(sae, sae.training_forward_pass(step).loss)
    assert_close(gradients(sae, compiled(step).loss), want)


def test_gradients_in_bfloat16_are_not_summed_in_bfloat16(make: Any):
    sae = make(dtype="float32")
    x = torch.randn(8192, 10, generator=torch.Generator().manual_seed(2)).bfloat16()
    sae.to(torch.bfloat16)
    exact = make(dtype="float64")
    exact.load_state_dict(sae.state_dict())
    got, want = (
        gradients(s, s(x.to(s.dtype)).double().pow(2).mean()) for s in (sae, exact)
    )
    # Tokens whose latents rounding decides differ; sums in bfloat16 would lose half.
    for name in ("b_dec", "b_enc", "omega"):
        if name not in want:
            continue
        error = (got[name].double() - want[name]).norm() / want[name].norm()
        assert error < 0.1, f"{name}: {error}"


def test_two_runs_with_several_threads_are_equal_to_the_bit():
    sae = scale_sae(d_sae=600, num_experts=10, dtype="float32")
    x = torch.randn(4096, 10, generator=torch.Generator().manual_seed(2))
    dead = torch.arange(600) % 4 == 0
    first, *others = (
        gradients(sae, sae.training_forward_pass(step_input(x, dead)).loss)
        for _ in range(6)
    )
    for other in others:
        assert_close(other, first, atol=0)


def test_gradients_of_an_expert_that_is_selected_twice_and_watched():
    sae = scale_sae()
    twice: Any = ("hook_expert_indices", lambda indices, hook: indices * 0 + 2)
    watch: Any = ("hook_sae_acts_pre", lambda value, hook: value)
    found = []
    for hooks in ([twice], [twice, watch]):
        with sae.hooks(hooks):
            found.append(gradients(sae, sae(X).sin().sum()))
    assert_close(*found)


def test_gradients_accumulate_and_outlive_the_step():
    sae = scale_sae()
    step = step_input(X)
    sae.training_forward_pass(step).loss.backward()
    first = {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}
    want = {name: gradient.clone() for name, gradient in first.items()}
    assert want
    sae.zero_grad()
    sae.training_forward_pass(step).loss.backward()
    sae.training_forward_pass(step).loss.backward()
    assert_close(first, want, atol=0)
    summed = {name: sae.get_parameter(name).grad for name in first}
    assert_close(summed, {name: 2 * gradient for name, gradient in want.items()})


def test_inference_computes_nothing_that_only_gradients_need(
    make: Any, monkeypatch: pytest.MonkeyPatch
):
    sae = make()

    def refuse(*_: Any) -> None:
        raise AssertionError("products were made differentiable")

    monkeypatch.setattr(encoding, "encoder_products", refuse)
    with torch.no_grad():
        sae(X)
        sae.decode(sae.encode(X))
    with pytest.raises(AssertionError, match="made differentiable"):
        sae(X)

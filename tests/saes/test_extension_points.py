"""SAELens's extension points: methods that its users override, as on its TopK SAE."""

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    DEAD,
    X,
    assert_close,
    gradients,
    inference,
    scale_sae,
    step_input,
    subclass,
    switch_sae,
)
from sae_lens.saes.sae import SAE, TrainStepInput
from sae_lens.saes.topk_sae import TopK, TopKTrainingSAE, TopKTrainingSAEConfig
from typing_extensions import override

from sae_lens_scale import ScaleTrainingSAE, SwitchTrainingSAE


class ShiftedInput:
    """An input that is moved by 1 before the encoder and the router see it."""

    def process_sae_in(self, sae_in: torch.Tensor) -> torch.Tensor:
        return super().process_sae_in(sae_in) + 1  # type: ignore[misc]


class DoubledActivations:
    """Activations that are doubled, with their pre-activations."""

    def encode_with_hidden_pre(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        acts, hidden_pre = super().encode_with_hidden_pre(x)  # type: ignore[misc]
        return 2 * acts, 2 * hidden_pre


class NegatedOutput:
    # A wrapper has the module of what it wraps.
    @functools.wraps(ScaleTrainingSAE.decode)
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        return -super().decode(feature_acts)  # type: ignore[misc]


def with_mixin(mixin: type, sae: Any) -> Any:
    return subclass(type("Custom", (mixin, type(sae)), {}), sae)


def test_process_sae_in_is_honoured(make: Any, sparse: bool):
    plain = make(use_sparse_activations=sparse)
    sae = with_mixin(ShiftedInput, plain)
    assert_close(sae.encode(X), plain.encode(X + 1))
    assert_close(sae(X), plain(X + 1))
    assert torch.equal(sae.route(X).indices, plain.route(X + 1).indices)
    got = sae.training_forward_pass(step_input(X, DEAD))
    want = plain.training_forward_pass(step_input(X + 1, DEAD))
    assert_close(got.sae_out, want.sae_out)
    assert_close(got.losses["load_balance_loss"], want.losses["load_balance_loss"])
    # The target is the input as it came.
    errors = (want.sae_out - X).pow(2).sum(-1).mean()
    assert_close(got.losses["mse_loss"], errors)
    assert_close(
        gradients(sae, got.losses["mse_loss"])["b_dec"],
        gradients(plain, errors)["b_dec"],
    )


def test_encode_with_hidden_pre_is_honoured(make: Any, sparse: bool):
    plain = make(use_sparse_activations=sparse)
    sae = with_mixin(DoubledActivations, plain)
    acts = plain.encode(X)
    assert_close(sae.encode(X), 2 * acts)
    assert_close(sae(X), plain.decode(2 * acts))
    output = sae.training_forward_pass(step_input(X, DEAD))
    assert_close(output.feature_acts, 2 * acts)
    assert_close(output.hidden_pre, 2 * plain.encode_with_hidden_pre(X)[1])
    assert_close(output.sae_out, plain.decode(2 * acts))
    want = plain.training_forward_pass(step_input(X, DEAD))
    assert_close(output.losses["load_balance_loss"], want.losses["load_balance_loss"])
    assert output.losses.keys() == want.losses.keys()


def test_decode_is_honoured(make: Any, sparse: bool):
    plain = make(use_sparse_activations=sparse, multi_topk_coefficient=0.5)
    sae = with_mixin(NegatedOutput, plain)
    assert_close(sae(X), -plain(X))
    output = sae.training_forward_pass(step_input(X, DEAD))
    assert_close(output.sae_out, -plain(X))
    assert_close(output.losses["mse_loss"], (plain(X) + X).pow(2).sum(-1).mean())


def test_methods_are_honoured_in_inference():
    plain = inference(scale_sae())
    assert_close(with_mixin(NegatedOutput, plain)(X), -plain(X))
    shifted = with_mixin(ShiftedInput, plain)
    assert_close(shifted.encode(X), plain.encode(X + 1))
    assert_close(shifted(X), plain(X + 1))


def test_an_encode_with_hidden_pre_of_ones_own_needs_nothing_of_ours():
    class OwnEncoder(ScaleTrainingSAE):
        @override
        def encode_with_hidden_pre(
            self, x: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            hidden_pre = self.process_sae_in(x) @ self.W_enc + self.b_enc
            return self.activation_fn(hidden_pre), hidden_pre

    plain = scale_sae(rescale_acts_by_decoder_norm=False)
    sae = subclass(OwnEncoder, plain)
    acts = TopK(6)((X - sae.b_dec) @ sae.W_enc + sae.b_enc)
    assert_close(sae.encode(X), acts)
    output = sae.training_forward_pass(step_input(X, DEAD))
    assert_close(output.sae_out, sae.decode(acts))
    assert output.losses["load_balance_loss"] > 0
    output.loss.backward()
    assert sae.W_router.grad is not None


def test_nothing_of_a_step_stays_on_the_sae(make: Any):
    for sae in (make(), with_mixin(DoubledActivations, make())):
        sae.training_forward_pass(step_input(X, DEAD)).loss.backward()
        copy.deepcopy(sae)
        with pytest.raises(ValueError, match="not finite"):
            sae.training_forward_pass(step_input(X * torch.nan, DEAD))
        copy.deepcopy(sae)


def test_calculate_topk_aux_loss_has_the_name_and_arguments_of_saelens():
    seen: dict[str, Any] = {}

    class OwnLoss:
        def calculate_topk_aux_loss(
            self,
            sae_in: torch.Tensor,
            sae_out: torch.Tensor,
            hidden_pre: torch.Tensor,
            dead_neuron_mask: torch.Tensor | None,
        ) -> torch.Tensor:
            seen.update(sae_in=sae_in, hidden_pre=hidden_pre, dead=dead_neuron_mask)
            loss = super().calculate_topk_aux_loss(  # type: ignore[misc]
                sae_in, sae_out, hidden_pre, dead_neuron_mask
            )
            return 3 * loss

    for plain in (
        scale_sae(),
        switch_sae(use_sparse_activations=False),
        TopKTrainingSAE(TopKTrainingSAEConfig(d_in=10, d_sae=60, k=6, dtype="float64")),
    ):
        sae = with_mixin(OwnLoss, plain)
        want = plain.training_forward_pass(step_input(X, DEAD))
        got = sae.training_forward_pass(step_input(X, DEAD))
        name = "auxiliary_reconstruction_loss"
        assert want.losses[name] > 0
        assert_close(got.losses[name], 3 * want.losses[name])
        assert torch.equal(seen["sae_in"], X)
        assert torch.equal(seen["hidden_pre"], got.hidden_pre)
        assert torch.equal(seen["dead"], DEAD)


def test_losses_computed_outside_of_a_step_are_those_of_the_step():
    sae = scale_sae(multi_topk_coefficient=0.5)
    step = step_input(X, DEAD)
    output = sae.training_forward_pass(step)
    acts, hidden_pre = sae.encode_with_hidden_pre(X)
    losses = sae.calculate_aux_loss(step, acts, hidden_pre, output.sae_out)
    assert_close({"mse_loss": output.losses["mse_loss"], **losses}, output.losses)


def test_calculate_aux_loss_may_have_saelenss_arguments_only():
    class WithoutLosses(SwitchTrainingSAE):
        @override
        def calculate_aux_loss(
            self,
            step_input: TrainStepInput,
            feature_acts: torch.Tensor,
            hidden_pre: torch.Tensor,
            sae_out: torch.Tensor,
        ) -> dict[str, torch.Tensor]:
            return {}

    sae = subclass(WithoutLosses, switch_sae())
    output = sae.training_forward_pass(step_input(X, DEAD))
    assert output.losses.keys() == {"mse_loss"}


@pytest.mark.parametrize("topk_over", ["activations", "gated_activations"])
def test_activation_fn_is_saelenss_topk_and_agrees_with_encode(
    make: Any, topk_over: str
):
    sae = make(topk_over=topk_over, gate="uniform")
    assert isinstance(sae.activation_fn, TopK)
    acts, hidden_pre = sae.encode_with_hidden_pre(X)
    assert_close(sae.activation_fn(hidden_pre), acts)
    # A tool that keeps fewer latents, or another TopK: both follow.
    twin = copy.deepcopy(sae)
    for k, change in (
        (2, lambda: setattr(sae.activation_fn, "k", 2)),
        (3, lambda: setattr(sae.cfg, "k", 3)),
        (4, lambda: setattr(sae, "activation_fn", TopK(4))),
    ):
        change()
        acts, hidden_pre = sae.encode_with_hidden_pre(X)
        assert (acts > 0).sum(-1).max() == sae.activation_fn.k == k
        assert_close(sae.activation_fn(hidden_pre), acts)
        assert_close(sae(X), sae.decode(acts))
    assert twin.activation_fn.k == twin.cfg.k == 6


class OwnForward(TopK):
    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("activation_fn", [torch.nn.ReLU(), OwnForward(6)], ids=str)
def test_an_activation_fn_that_the_encoder_would_ignore_is_refused(activation_fn: Any):
    sae: SAE[Any] = scale_sae()
    sae.activation_fn = activation_fn
    with pytest.raises(ValueError, match="activation_fn must be SAELens's TopK, got"):
        sae.encode(X)


@pytest.mark.parametrize("k", [0, 25])
def test_a_k_that_no_token_can_keep_is_refused(k: int):
    sae = scale_sae()
    sae.activation_fn.k = k
    with pytest.raises(
        ValueError, match=f"k must be an integer from 1 to the 24 .*, got {k}"
    ):
        sae.encode(X)


def test_a_config_that_is_replaced_counts():
    sae = scale_sae()
    sae.cfg = copy.deepcopy(sae.cfg)
    sae.cfg.k = 2
    assert (sae.encode(X) > 0).sum(-1).max() == 2


LOSSES: dict[str, Any] = {"multi_topk_coefficient": 0.5, "aux_loss_coefficient": 0.25}


def other_losses(sae: Any, x: torch.Tensor, sae_out: torch.Tensor) -> Any:
    return sae.calculate_aux_loss(step_input(x, DEAD), x, x, sae_out)


class LooksElsewhere:
    """Encodes another batch, and its own without gradients, before the losses."""

    def calculate_aux_loss(
        self, step_input: TrainStepInput, *args: Any
    ) -> dict[str, torch.Tensor]:
        sae: Any = self
        sae.encode_with_hidden_pre(-3 * X)
        with torch.no_grad():
            sae.encode_with_hidden_pre(step_input.sae_in)
        return super().calculate_aux_loss(step_input, *args)  # type: ignore[misc]


class TrainsElsewhere:
    """Does a whole step of another batch in the midst of its own."""

    nested = False

    def calculate_aux_loss(
        self, step_input: TrainStepInput, *args: Any
    ) -> dict[str, torch.Tensor]:
        if not self.nested:
            self.nested = True
            sae: Any = self
            sae.training_forward_pass(replace(step_input, sae_in=-3 * X))
            self.nested = False
        return super().calculate_aux_loss(step_input, *args)  # type: ignore[misc]


class EncodesTwice:
    """Encodes a noisy copy after its own input."""

    def encode_with_hidden_pre(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result = super().encode_with_hidden_pre(x)  # type: ignore[misc]
        super().encode_with_hidden_pre(-3 * x)  # type: ignore[misc]
        return result


@pytest.mark.parametrize("mixin", [LooksElsewhere, TrainsElsewhere, EncodesTwice])
def test_losses_are_those_of_the_steps_own_batch(make: Any, sparse: bool, mixin: type):
    plain = make(use_sparse_activations=sparse, **LOSSES)
    sae = with_mixin(mixin, plain)
    want = plain.training_forward_pass(step_input(X, DEAD, is_logging_step=True))
    got = sae.training_forward_pass(step_input(X, DEAD, is_logging_step=True))
    assert_close(got.losses, want.losses)
    assert all(loss.requires_grad for loss in got.losses.values())
    assert got.metrics == want.metrics


def test_losses_of_a_batch_that_is_asked_for_within_a_step():
    seen = []

    class AsksForAnother:
        def calculate_aux_loss(
            self, step_input: TrainStepInput, *args: Any
        ) -> dict[str, torch.Tensor]:
            other = replace(step_input, sae_in=-3 * X)
            seen.append(super().calculate_aux_loss(other, *args))  # type: ignore[misc]
            return super().calculate_aux_loss(step_input, *args)  # type: ignore[misc]

    plain = scale_sae(**LOSSES)
    output = with_mixin(AsksForAnother, plain).training_forward_pass(
        step_input(X, DEAD)
    )
    want = other_losses(plain, -3 * X, output.sae_out)
    for name, loss in want.items():
        assert_close(seen[0][name], loss)
        assert (seen[0][name] - output.losses[name]).abs() > 1e-3


def test_an_encode_of_ones_own_leaves_the_step_sparse():
    class OwnEncode(ScaleTrainingSAE):
        @override
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("SAELens's training steps do not call encode")

    sae = subclass(OwnEncode, scale_sae())
    assert sae.training_forward_pass(step_input(X, DEAD)).feature_acts.is_sparse
    with pytest.raises(AssertionError):
        sae(X)


def test_hooks_see_a_step_once(make: Any):
    class OwnEncoder:
        def encode_with_hidden_pre(
            self, x: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            sae: Any = self
            pre = sae.hook_sae_acts_pre(sae.process_sae_in(x) @ sae.W_enc + sae.b_enc)
            return sae.activation_fn(pre), pre

    seen: list[str] = []
    for plain in (make(), make(use_sparse_activations=False)):
        for sae in (plain, with_mixin(DoubledActivations, plain)):
            hooks = [(n, lambda t, hook: seen.append(hook.name)) for n in sae.hook_dict]
            with sae.hooks(fwd_hooks=hooks):
                sae.training_forward_pass(step_input(X, DEAD))
            assert len(seen) == len(set(seen)) == len(sae.hook_dict) - 2
            seen.clear()
    sae = with_mixin(OwnEncoder, make())
    hooks = [(name, lambda t, hook: seen.append(hook.name)) for name in sae.hook_dict]
    with sae.hooks(fwd_hooks=hooks):
        sae.training_forward_pass(step_input(X, DEAD))
    assert sorted(seen) == ["hook_sae_acts_pre", "hook_sae_input", "hook_sae_recons"]


def test_an_edit_may_send_tokens_to_a_shared_expert_in_training():
    sae = scale_sae(num_shared_experts=1, experts_per_token=3)

    def edit(indices: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.zeros_like(indices)

    with sae.hooks(fwd_hooks=[("hook_expert_indices", edit)]):
        output = sae.training_forward_pass(step_input(X, DEAD, is_logging_step=True))
    assert output.losses["load_balance_loss"] == 0
    assert output.metrics["router/idle_experts"] == 4

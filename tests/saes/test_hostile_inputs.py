"""Inputs that nobody means to give: each works, or is refused by name and value."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close, scale_sae, step_input, switch_sae
from sae_lens.saes.sae import SAE, TrainingSAE, TrainingSAEConfig
from torch.utils.checkpoint import checkpoint

from sae_lens_scale import ScaleTrainingSAEConfig, SwitchTrainingSAEConfig
from sae_lens_scale.analysis.experts import expert_usage

MAKERS = {"scale": scale_sae, "switch": switch_sae}
TRAINING_CONFIGS = [ScaleTrainingSAEConfig, SwitchTrainingSAEConfig]
X = torch.randn(8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
DEAD = torch.arange(60) % 2 == 0

both_architectures = pytest.mark.parametrize("architecture", list(MAKERS))
both_configs = pytest.mark.parametrize("config_class", TRAINING_CONFIGS)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make(architecture: str, **overrides: Any) -> Any:
    """A small random training SAE in float64: 12 latents in each of 5 experts, k 6."""
    return MAKERS[architecture](**overrides)


def exported(sae: Any, folder: Path) -> Any:
    sae.save_inference_model(folder)
    return SAE.load_from_disk(folder)


# Configs


@both_configs
def test_what_a_sweep_script_hands_over_builds_trains_and_can_be_saved(
    config_class: Any, tmp_path: Path
):
    cfg = config_class(
        d_in=np.int64(10),
        d_sae=np.int32(60),
        num_experts=np.int64(5),
        k=np.uint8(6),
        gate=np.str_("softmax"),
        apply_b_dec_to_input=np.True_,
        load_balance_coefficient=np.float32(0.5),
        aux_loss_coefficient=np.int64(1),
        decoder_init_norm=np.float32(0.5),
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    assert (cfg.d_in, cfg.k, cfg.load_balance_coefficient) == (10, 6, 0.5)
    assert (cfg.dtype, cfg.device) == ("float64", "cpu")
    sae: Any = TrainingSAE.from_dict(cfg.to_dict())
    sae.training_forward_pass(step_input(X, DEAD)).loss.backward()
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert loaded.cfg.to_dict() == sae.cfg.to_dict()
    assert_close(exported(sae, tmp_path / "export")(X), sae(X))


@both_configs
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", np.float64(3)),
        ("k", torch.tensor(3)),
        ("k", np.True_),
        ("num_experts", None),
        ("num_experts", [4]),
        ("gate", ["softmax"]),
        ("topk_over", {}),
        ("load_balance_coefficient", True),
        ("load_balance_coefficient", 10**400),
        ("aux_loss_coefficient", True),
        ("aux_loss_coefficient", np.float32("nan")),
        ("aux_loss_coefficient", torch.tensor(0.1)),
        ("decoder_init_norm", 0.0),
        ("decoder_init_norm", -1.0),
        ("decoder_init_norm", float("nan")),
        ("decoder_init_norm", float("inf")),
        ("decoder_init_norm", "0.1"),
        ("decoder_init_norm", True),
    ],
    ids=lambda value: str(value)[:20],
)
def test_values_of_the_wrong_kind_are_refused(config_class: Any, name: str, value: Any):
    settings = {"d_in": 8, "d_sae": 64, "num_experts": 4, "k": 3, name: value}
    with pytest.raises(ValueError, match=f"{name} must be .*got "):
        config_class(**settings)
    with pytest.raises(ValueError, match=f"{name} must be .*got "):
        TrainingSAEConfig.from_dict(
            {**settings, "architecture": config_class.architecture(), "metadata": {}}
        )


@both_configs
def test_dtypes_that_no_sae_can_have_are_refused(config_class: Any):
    with pytest.raises(ValueError, match=r"Invalid dtype: torch\.int8"):
        config_class(d_in=512, d_sae=1024, dtype=torch.int8)


# Activations


@both_architectures
@pytest.mark.parametrize(
    "x",
    [
        X.T.contiguous().T,
        X[:1].expand(8, 10),
        torch.stack([X, X], dim=-1)[..., 0],
        X.flip(0)[1::2],
        torch.arange(80).view(8, 10) - 40,
        X > 0,
        X.bfloat16(),
        X.clone().requires_grad_(),
        torch.nn.Parameter(X),
    ],
    ids=[
        "transposed",
        "expanded",
        "strided",
        "sliced",
        "integer",
        "bool",
        "bfloat16",
        "requires_grad",
        "parameter",
    ],
)
def test_only_the_values_of_an_input_matter(architecture: str, x: torch.Tensor):
    sae = make(architecture)
    plain = x.detach().double().clone(memory_format=torch.contiguous_format)
    before = x.detach().clone()
    assert torch.equal(sae.encode(x), sae.encode(plain))
    assert torch.equal(sae(x), sae(plain))
    if x.is_floating_point():
        step = sae.training_forward_pass(step_input(x, DEAD))
        want = sae.training_forward_pass(step_input(plain, DEAD))
        assert_close(step.loss.double(), want.loss)
    assert torch.equal(x, before)


@both_architectures
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (0, 0)], ids=str)
def test_empty_batches_of_any_shape(architecture: str, shape: tuple[int, ...]):
    sae = make(architecture)
    x = torch.empty(*shape, 10)
    assert sae.encode(x).shape == (*shape, 60)
    assert sae(x).shape == (*shape, 10)
    assert sae.decode(sae.encode(x).to_sparse()).shape == (*shape, 10)
    assert sae.route(x).probabilities.shape == (*shape, 5)
    with pytest.raises(ValueError, match="the batch is empty"):
        sae.training_forward_pass(step_input(x.double(), DEAD))
    with pytest.raises(ValueError, match="at least num_experts=5 tokens, got 0"):
        sae.initialize_from_activations(x)
    with pytest.raises(ValueError, match="at least one token, got none"):
        expert_usage(sae, [x])


@both_architectures
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_token_harms_no_other_whatever_the_normalisation(
    architecture: str, norm: str, bad: float
):
    sae = make(architecture, normalize_activations=norm, aux_loss_coefficient=0)
    x = X.clone()
    x[3, 2] = bad
    others = torch.arange(8) != 3
    for use_error_term in (False, True):
        sae._use_error_term = use_error_term
        out = sae(x)
        assert not out[3].isfinite().any()
        assert_close(out[others], sae(X)[others])


@both_architectures
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (8, 1), (8, 59), (8, 61)], ids=str)
def test_activations_of_the_wrong_width_are_not_decoded(
    architecture: str, rescale: bool, shape: tuple[int, ...]
):
    sae = make(architecture, rescale_acts_by_decoder_norm=rescale)
    with pytest.raises(ValueError, match="feature_acts must be d_sae=60, got shape"):
        sae.decode(torch.ones(shape, dtype=torch.float64))


@both_architectures
def test_entries_that_a_sparse_tensor_holds_twice_add_up(architecture: str):
    sae = make(architecture)
    where = torch.tensor([[0, 0, 1, 1], [0, 0, 2, 2], [5, 5, 7, 9]])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    acts = torch.sparse_coo_tensor(where, values, (2, 3, 60), check_invariants=True)
    assert not acts.is_coalesced()
    assert_close(sae.decode(acts), sae.decode(acts.to_dense()))


# Weights


@both_architectures
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("zeros", ["some decoder rows", "encoder", "everything"])
def test_weights_of_zero_stay_finite_in_every_use(
    architecture: str, rescale: bool, zeros: str, tmp_path: Path
):
    sae = make(architecture, rescale_acts_by_decoder_norm=rescale)
    with torch.no_grad():
        if zeros == "some decoder rows":
            sae.W_dec[::3] = 0
        for name, parameter in sae.named_parameters():
            if zeros == "everything" or (zeros == "encoder" and "enc" in name):
                parameter.zero_()
    want = sae(X)
    assert want.isfinite().all()
    sae.training_forward_pass(step_input(X, DEAD)).loss.backward()
    for name, parameter in sae.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert_close(exported(sae, tmp_path)(X), want)
    if rescale:
        sae.fold_W_dec_norm()
        assert_close(sae(X), want)


@both_architectures
def test_ties_everywhere_keep_k_latents_the_same_each_time(architecture: str):
    sae = make(architecture)
    with torch.no_grad():
        sae.W_router.zero_()
        sae.W_enc.fill_(1)
        sae.b_enc.fill_(10)
    acts = sae.encode(X)
    assert (acts.count_nonzero(-1) == 6).all()
    assert torch.equal(sae.encode(X), acts)


SIZES = {
    "a latent per expert": {"num_experts": 60, "k": 1},
    "one expert": {"num_experts": 1, "k": 60},
    "odd": {"d_sae": 45, "num_experts": 15, "k": 3},
    "one dimension": {"d_in": 1},
}
SCALE_SIZES = {
    **{name: {**sizes, "experts_per_token": 1} for name, sizes in SIZES.items()},
    "several latents, one per expert": {
        "num_experts": 60,
        "experts_per_token": 3,
        "k": 3,
    },
    "all experts": {"experts_per_token": 5, "k": 60},
}


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        pytest.param("switch", sizes, id=f"switch, {name}")
        for name, sizes in SIZES.items()
    ]
    + [
        pytest.param(
            "scale",
            {**sizes, "decomposition": decomposition},
            id=f"scale, {decomposition}, {name}",
        )
        for name, sizes in SCALE_SIZES.items()
        for decomposition in ("mean", "identity", "learned")
    ],
)
def test_sizes_at_the_edge_train_save_and_initialise(
    architecture: str, settings: dict[str, Any], tmp_path: Path
):
    sae = make(architecture, **settings)
    x, dead = X[:, : sae.cfg.d_in], torch.arange(sae.cfg.d_sae) % 2 == 0
    step = sae.training_forward_pass(step_input(x, dead, is_logging_step=True))
    step.loss.backward()
    assert_close(step.sae_out, sae(x))
    assert_close(exported(sae, tmp_path)(x), sae(x))
    sae.initialize_from_activations(torch.randn(100, sae.cfg.d_in))
    assert sae(x).isfinite().all()


# Starting points


@both_architectures
@pytest.mark.parametrize("value", [1e25, 3e38, -3e38])
@pytest.mark.parametrize("norm", ["none", "expected_average_only_in"])
def test_activations_whose_norms_overflow_are_refused_before_anything_changes(
    architecture: str, value: float, norm: str
):
    sae = make(architecture, normalize_activations=norm)
    before = copy.deepcopy(sae.state_dict())
    with pytest.raises(ValueError, match="batch must be finite, in norms"):
        sae.initialize_from_activations(torch.full((20, 10), value))
    for name, parameter in sae.state_dict().items():
        assert torch.equal(parameter, before[name])


@both_architectures
def test_activations_that_normalisation_turns_into_nan_are_refused(architecture: str):
    sae = make(
        architecture,
        normalize_activations="constant_norm_rescale",
        aux_loss_coefficient=0,
    )
    batch = torch.ones(20, 10)
    batch[7] = 0
    with pytest.raises(ValueError, match="once normalised"):
        sae.initialize_from_activations(batch)


@both_architectures
@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(20, 10),
        torch.full((20, 10), 3),
        torch.full((20, 10), 1e-30),
        torch.eye(10)[:5],
    ],
    ids=["zeros", "equal integers", "tiny", "a token per expert"],
)
def test_activations_without_spread_give_finite_weights(
    architecture: str, batch: torch.Tensor
):
    sae = make(architecture)
    sae.initialize_from_activations(batch)
    assert all(parameter.isfinite().all() for parameter in sae.parameters())


def test_a_single_token_for_a_single_expert_gives_finite_weights():
    sae = make("switch", num_experts=1)
    sae.initialize_from_activations(torch.ones(1, 10))
    assert all(parameter.isfinite().all() for parameter in sae.parameters())


# Hooks


def give(value: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda *_, **__: value


@pytest.mark.parametrize("method", ["forward", "route", "training_forward_pass"])
@pytest.mark.parametrize(
    ("edited", "message"),
    [
        (torch.full((8, 2), 5), "range.num_experts=5., got 5"),
        (torch.full((8, 2), -1), "range.num_experts=5., got -1"),
        # Counting tokens by expert would take 8 TB.
        (torch.full((8, 2), 10**12), "got 1000000000000"),
        (torch.zeros(8, 2), "keep the shape .8, 2. and int64, got .* torch.float32"),
        (torch.zeros(8, 1, dtype=torch.int64), "keep the shape .8, 2. .*got .8, 1."),
        (torch.zeros(1, 2, dtype=torch.int64), "keep the shape .8, 2. .*got .1, 2."),
    ],
    ids=["too high", "negative", "huge", "float", "narrow", "one token"],
)
def test_expert_indices_that_are_none_are_refused(
    method: str, edited: torch.Tensor, message: str
):
    sae = make("scale")
    x = step_input(X) if method == "training_forward_pass" else X
    with (
        sae.hooks([("hook_expert_indices", give(edited))]),
        pytest.raises(ValueError, match=f"hook_expert_indices must .*{message}"),
    ):
        getattr(sae, method)(x)


def test_expert_indices_edited_in_place_are_checked_too():
    sae = make("scale")

    def spoil(indices: torch.Tensor, hook: Any) -> None:
        indices[4, 1] = 17

    with (
        sae.hooks([("hook_expert_indices", spoil)]),
        pytest.raises(ValueError, match="hook_expert_indices must .* got 17"),
    ):
        sae.encode(X)


@pytest.mark.parametrize("shape", [(8, 1), (1, 2), (8, 3), ()], ids=str)
def test_expert_weights_of_another_shape_are_refused(shape: tuple[int, ...]):
    sae = make("scale")
    with (
        sae.hooks([("hook_expert_weights", give(torch.ones(shape)))]),
        pytest.raises(ValueError, match="hook_expert_weights must keep the shape"),
    ):
        sae.encode(X)


def test_an_expert_that_an_edit_selects_twice_counts_twice():
    # Ranked before the gate: two latents that are one have gates of their own.
    sae = make("scale", topk_over="activations")
    once = make("scale", experts_per_token=1, k=3, gate="uniform")
    experts = sae.route(X).indices[:, :1]
    gates = torch.tensor([0.25, 0.5], dtype=torch.float64).expand(8, 2)
    edits = [
        ("hook_expert_indices", give(experts.expand(8, 2))),
        ("hook_expert_weights", give(gates)),
    ]
    with sae.hooks(edits), once.hooks([("hook_expert_indices", give(experts))]):
        acts, want = sae.encode(X), 0.75 * once.encode(X)
        step = sae.training_forward_pass(step_input(X))
    assert_close(acts, want)
    assert_close(step.feature_acts.to_dense(), want)
    assert_close(step.sae_out, sae.decode(want))


@both_architectures
def test_an_input_that_an_edit_makes_one_wide_is_refused(architecture: str):
    sae = make(architecture)
    with (
        sae.hooks([("hook_sae_input", give(X[:, :1]))]),
        pytest.raises(ValueError, match=r"d_in=10, got shape \(8, 1\)"),
    ):
        sae(X)


# Torch's modes and transforms


@both_architectures
def test_first_and_second_derivatives_are_those_of_finite_differences(
    architecture: str,
):
    sae = make(architecture)
    x = X[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(sae.encode, (x,))
    assert torch.autograd.gradgradcheck(sae, (x,))


@both_architectures
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(architecture: str, use_reentrant: bool):
    sae = make(architecture, normalize_activations="layer_norm", aux_loss_coefficient=0)
    gradients = []
    for run in (sae, partial(checkpoint, sae, use_reentrant=use_reentrant)):
        x = X.clone().requires_grad_()
        run(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@both_architectures
def test_parameters_can_be_given_from_outside(architecture: str):
    sae = make(architecture)
    doubled = {name: 2 * p.detach() for name, p in sae.named_parameters()}
    other = copy.deepcopy(sae)
    other.load_state_dict(doubled)
    assert torch.equal(torch.func.functional_call(sae, doubled, (X,)), other(X))


@both_architectures
def test_a_training_step_under_torchs_strictest_settings(architecture: str):
    sae = make(architecture)
    want = sae.training_forward_pass(step_input(X, DEAD)).loss
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.set_detect_anomaly(True):
            step = sae.training_forward_pass(step_input(X, DEAD))
            step.loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(step.loss, want)


@both_architectures
def test_defaults_of_torch_do_not_leak_in(architecture: str, tmp_path: Path):
    cfg = make(architecture).cfg.to_dict()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        # Tensors made without a device end up on the meta device.
        with torch.device("meta"):
            sae: Any = TrainingSAE.from_dict(cfg)
            step = sae.training_forward_pass(step_input(X, DEAD, is_logging_step=True))
            step.loss.backward()
            sae.initialize_from_activations(X)
            loaded = exported(sae, tmp_path)
    finally:
        torch.set_default_dtype(before)
    assert (step.loss.dtype, step.loss.device.type) == (torch.float64, "cpu")
    for parameter in (*sae.parameters(), *loaded.parameters()):
        assert (parameter.dtype, parameter.device.type) == (torch.float64, "cpu")
    assert_close(loaded(X), sae(X))


@both_architectures
def test_an_sae_on_another_device_than_its_input_says_so(architecture: str):
    sae = make(architecture).to("meta")
    with pytest.raises(RuntimeError, match="device"):
        sae(X)
    weights = make(architecture).state_dict()
    sae.to_empty(device="cpu").load_state_dict(weights)
    assert torch.equal(sae(X), make(architecture)(X))


@both_architectures
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_trains_folds_and_is_saved(
    architecture: str, dtype: str, tmp_path: Path
):
    sae = make(architecture, dtype=dtype)
    x = X.to(sae.dtype)
    sae.training_forward_pass(step_input(x, DEAD)).loss.backward()
    assert all(p.grad.isfinite().all() for p in sae.parameters() if p.grad is not None)
    sae.save_model(tmp_path)
    in_float64 = make(architecture)
    in_float64.load_state_dict(sae.state_dict())
    loaded = SAE.load_from_disk(tmp_path, dtype="float64")
    assert_close(loaded(x), in_float64(x))
    sae.fold_W_dec_norm()
    sae.fold_activation_norm_scaling_factor(2.0)
    assert sae(x).dtype == sae.dtype
    assert sae(x).isfinite().all()

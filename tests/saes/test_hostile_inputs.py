"""Inputs that nobody means to give: each works, or is refused by name and value."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from helpers import DEAD, X, assert_close, exported, scale_sae, step_input, switch_sae
from packaging.version import Version
from sae_lens.saes.sae import SAE, TrainingSAE
from torch.utils.checkpoint import checkpoint

from sae_lens_scale.analysis.experts import expert_usage


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# Activations


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(X.T.contiguous().T, id="transposed"),
        pytest.param(X[:1].expand(8, 10), id="expanded"),
        pytest.param(torch.stack([X, X], dim=-1)[..., 0], id="strided"),
        pytest.param(X.flip(0)[1::2], id="sliced"),
        pytest.param(torch.arange(80).view(8, 10) - 40, id="integer"),
        pytest.param(X > 0, id="bool"),
        pytest.param(X.bfloat16(), id="bfloat16"),
        pytest.param(X.clone().requires_grad_(), id="requires_grad"),
        pytest.param(torch.nn.Parameter(X), id="parameter"),
    ],
)
def test_only_the_values_of_an_input_matter(make: Any, x: torch.Tensor):
    sae = make()
    plain = x.detach().double().clone(memory_format=torch.contiguous_format)
    before = x.detach().clone()
    assert torch.equal(sae.encode(x), sae.encode(plain))
    assert torch.equal(sae(x), sae(plain))
    if x.is_floating_point():
        step = sae.training_forward_pass(step_input(x, DEAD))
        want = sae.training_forward_pass(step_input(plain, DEAD))
        assert_close(step.loss.double(), want.loss)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (0, 0)], ids=str)
def test_empty_batches_of_any_shape(make: Any, shape: tuple[int, ...]):
    sae = make()
    x = torch.empty(*shape, 10)
    assert sae.encode(x).shape == (*shape, 60)
    assert sae(x).shape == (*shape, 10)
    assert sae.decode(sae.encode(x).to_sparse()).shape == (*shape, 10)
    assert sae.route(x).probabilities.shape == (*shape, 5)
    with pytest.raises(ValueError, match=r"of shape \(.*10\),.*the batch is empty"):
        sae.training_forward_pass(step_input(x.double(), DEAD))
    with pytest.raises(ValueError, match="at least num_experts=5 tokens, got 0"):
        sae.initialize_from_activations(x)
    with pytest.raises(ValueError, match="at least one token, got none"):
        expert_usage(sae, [x])


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_token_harms_no_other_whatever_the_normalisation(
    make_either: Any, norm: str, bad: float
):
    sae = make_either(normalize_activations=norm, aux_loss_coefficient=0)
    x = X.clone()
    x[3, 2] = bad
    others = torch.arange(8) != 3
    for use_error_term in (False, True):
        sae._use_error_term = use_error_term
        out = sae(x)
        assert not out[3].isfinite().any()
        assert_close(out[others], sae(X)[others])


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (8, 1), (8, 59), (8, 61)], ids=str)
def test_activations_of_the_wrong_width_are_not_decoded(
    make: Any, rescale: bool, shape: tuple[int, ...]
):
    sae = make(rescale_acts_by_decoder_norm=rescale)
    with pytest.raises(ValueError, match="feature_acts must be d_sae=60, got shape"):
        sae.decode(torch.ones(shape, dtype=torch.float64))


def test_entries_that_a_sparse_tensor_holds_twice_add_up(make: Any):
    sae = make()
    where = torch.tensor([[0, 0, 1, 1], [0, 0, 2, 2], [5, 5, 7, 9]])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    acts = torch.sparse_coo_tensor(where, values, (2, 3, 60), check_invariants=True)
    assert not acts.is_coalesced()
    assert_close(sae.decode(acts), sae.decode(acts.to_dense()))


# Weights


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("zeros", ["some decoder rows", "encoder", "everything"])
def test_weights_of_zero_stay_finite_in_every_use(
    make: Any, rescale: bool, zeros: str, tmp_path: Path
):
    sae = make(rescale_acts_by_decoder_norm=rescale)
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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_pruned_latents_stay_finite_in_half_precision(
    make: Any, dtype: str, tmp_path: Path
):
    sae = make(dtype=dtype)
    sae.W_dec.data[::3] = 0
    want = sae(X)
    exported(sae, tmp_path)
    folded = copy.deepcopy(sae)
    folded.fold_W_dec_norm()

    def steer(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        # Their rows are zero: it changes nothing.
        acts[..., ::3] += 100
        return acts

    for other in (sae, folded, SAE.load_from_disk(tmp_path)):
        steered = other.run_with_hooks(X, fwd_hooks=[("hook_sae_acts_post", steer)])
        assert steered.dtype == want.dtype
        for out in (steered, other(X)):
            assert (out - want).norm() < 0.02 * want.norm()


def test_ties_everywhere_keep_k_latents_the_same_each_time(make: Any):
    sae = make()
    with torch.no_grad():
        sae.W_router.zero_()
        sae.W_enc.fill_(1)
        sae.b_enc.fill_(10)
    acts = sae.encode(X)
    assert (acts.count_nonzero(-1) == 6).all()
    assert torch.equal(sae.encode(X), acts)


ONE_PER_TOKEN: list[dict[str, Any]] = [
    {"num_experts": 60, "k": 1},
    {"num_experts": 1, "k": 60},
    {"d_sae": 1, "num_experts": 1, "k": 1},
    {"d_sae": 45, "num_experts": 15, "k": 3},
    {"d_in": 1},
]
SCALE_SIZES: list[dict[str, Any]] = [
    *({**sizes, "experts_per_token": 1} for sizes in ONE_PER_TOKEN),
    {"num_experts": 60, "experts_per_token": 3, "k": 3},
    {"experts_per_token": 5, "k": 60},
]


@pytest.mark.parametrize(
    ("maker", "settings"),
    [(switch_sae, sizes) for sizes in ONE_PER_TOKEN]
    + [
        (scale_sae, {**sizes, "decomposition": decomposition})
        for sizes in SCALE_SIZES
        for decomposition in ("mean", "identity", "learned")
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else value.__name__,
)
def test_sizes_at_the_edge_train_save_fold_and_initialise(
    maker: Any, settings: dict[str, Any], tmp_path: Path
):
    sae = maker(**settings)
    sae.b_enc.data += 1  # some latents are active
    x, dead = X[:, : sae.cfg.d_in], torch.arange(sae.cfg.d_sae) % 2 == 0
    step = sae.training_forward_pass(step_input(x, dead, is_logging_step=True))
    step.loss.backward()
    want = sae(x)
    assert sae.encode(x).any()
    assert_close(step.sae_out, want)
    assert_close(exported(sae, tmp_path)(x), want)
    shapes = {name: p.shape for name, p in sae.named_parameters()}
    sae.fold_W_dec_norm()
    sae.fold_activation_norm_scaling_factor(2.0)
    assert {name: p.shape for name, p in sae.named_parameters()} == shapes
    assert_close(2 * sae(x / 2), want)
    sae.initialize_from_activations(torch.randn(100, sae.cfg.d_in))
    assert sae(x).isfinite().all()


# Torch's modes and transforms


def test_first_and_second_derivatives_are_those_of_finite_differences(make: Any):
    sae = make()
    x = X[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(sae.encode, (x,))
    assert torch.autograd.gradgradcheck(sae, (x,))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(make: Any, use_reentrant: bool):
    sae = make(normalize_activations="layer_norm", aux_loss_coefficient=0)
    gradients = []
    for run in (sae, partial(checkpoint, sae, use_reentrant=use_reentrant)):
        x = X.clone().requires_grad_()
        run(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_parameters_can_be_given_from_outside(make: Any):
    sae = make()
    doubled = {name: 2 * p.detach() for name, p in sae.named_parameters()}
    other = copy.deepcopy(sae)
    for name, parameter in other.named_parameters():
        parameter.data.copy_(doubled[name])
    assert torch.equal(torch.func.functional_call(sae, doubled, (X,)), other(X))


def test_a_training_step_under_torchs_strictest_settings(make: Any):
    sae = make()
    want = sae.training_forward_pass(step_input(X, DEAD)).loss
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.set_detect_anomaly(True):
            step = sae.training_forward_pass(step_input(X, DEAD))
            step.loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(step.loss, want)


def test_defaults_of_torch_do_not_leak_in(make: Any, tmp_path: Path):
    cfg = make().cfg.to_dict()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        # Tensors made without a device end up on the meta device.
        with torch.device("meta"):
            sae: Any = TrainingSAE.from_dict(cfg)
            step = sae.training_forward_pass(step_input(X, DEAD, is_logging_step=True))
            step.loss.backward()
            sae.initialize_from_activations(X)
        # Older ones load onto the default device, whichever is asked for.
        is_obeyed = Version(safetensors.__version__) >= Version("0.6.2")
        with torch.device("meta" if is_obeyed else "cpu"):
            loaded = exported(sae, tmp_path)
    finally:
        torch.set_default_dtype(before)
    assert (step.loss.dtype, step.loss.device.type) == (torch.float64, "cpu")
    for parameter in (*sae.parameters(), *loaded.parameters()):
        assert (parameter.dtype, parameter.device.type) == (torch.float64, "cpu")
    assert_close(loaded(X), sae(X))


def test_an_sae_on_another_device_than_its_input_says_so(make: Any):
    sae = make().to("meta")
    with pytest.raises(RuntimeError, match="device"):
        sae(X)
    sae.to_empty(device="cpu").load_state_dict(make().state_dict())
    assert torch.equal(sae(X), make()(X))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_trains_folds_and_is_saved(
    make: Any, dtype: str, tmp_path: Path
):
    sae = make(dtype=dtype)
    x = X.to(sae.dtype)
    sae.training_forward_pass(step_input(x, DEAD)).loss.backward()
    assert all(p.grad.isfinite().all() for p in sae.parameters() if p.grad is not None)
    sae.save_model(tmp_path)
    in_float64 = make()
    in_float64.load_state_dict(sae.state_dict())
    loaded = SAE.load_from_disk(tmp_path, dtype="float64")
    assert_close(loaded(x), in_float64(x))
    sae.fold_W_dec_norm()
    sae.fold_activation_norm_scaling_factor(2.0)
    assert sae(x).dtype == sae.dtype
    assert sae(x).isfinite().all()

"""Demands of SAELens's own tests on its architectures, one SAE at a time."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DEAD, X, assert_close, draw, inference, scale_sae, step_input
from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader
from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    eval_sae_on_synthetic_data,
    init_sae_to_match_feature_dict,
)
from torch import nn
from torch.torch_version import TorchVersion


def base_of(sae: Any) -> Any:
    """SAELens's class that loads SAEs of this use."""
    return TrainingSAE if isinstance(sae, TrainingSAE) else SAE


META = torch.device("meta")


@pytest.mark.parametrize(
    ("args", "kwargs", "device", "dtype"),
    [
        (("meta",), {}, "meta", torch.float64),
        ((META,), {}, "meta", torch.float64),
        ((torch.float16,), {}, "cpu", torch.float16),
        ((META, torch.bfloat16), {}, "meta", torch.bfloat16),
        (
            (),
            {"device": "meta", "dtype": torch.float16, "non_blocking": True},
            "meta",
            torch.float16,
        ),
        ((torch.empty(1, device=META),), {}, "meta", torch.float32),
        ((), {}, "cpu", torch.float64),
    ],
    ids=str,
)
def test_moving_takes_every_parameter_and_the_config_along(
    make_either: Any, args: Any, kwargs: Any, device: str, dtype: torch.dtype
):
    sae = make_either()
    assert sae.to(*args, **kwargs) is sae
    assert (sae.device, sae.dtype) == (torch.device(device), dtype)
    assert (sae.cfg.device, f"torch.{sae.cfg.dtype}") == (device, str(dtype))
    for parameter in sae.parameters():
        assert (parameter.device.type, parameter.dtype) == (device, dtype)
    if device == "cpu":
        assert sae(X).dtype == dtype


@pytest.mark.parametrize("decoder_init_norm", [0.1, 0.7, None])
def test_a_fresh_training_sae_starts_tied_with_the_asked_decoder_norm(
    make: Any, decoder_init_norm: float | None
):
    cfg = make(decoder_init_norm=decoder_init_norm).cfg
    sae: Any = TrainingSAE.from_dict(cfg.to_dict())
    norms = sae.W_dec.norm(dim=-1)
    if decoder_init_norm is None:
        assert norms.std() > 0.01
    else:
        assert_close(norms, torch.full_like(norms, decoder_init_norm))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert sae.W_enc.is_contiguous()
    for name in ("b_enc", "b_dec", "b_router", "omega"):
        assert not getattr(sae, name, torch.zeros(1)).any()
    # A router of zeros would send every token to the same experts.
    assert sae.route(X).indices.unique().numel() > 2


@pytest.mark.parametrize("shape", [(), (4,), (4, 5), (4, 5, 6), (4, 5, 6, 7)])
@pytest.mark.parametrize("rescale", [True, False])
def test_decode_takes_sparse_activations_of_any_shape(
    make_either: Any, shape: tuple[int, ...], rescale: bool
):
    sae = make_either(rescale_acts_by_decoder_norm=rescale)
    acts = draw(*shape, 60, seed=2).relu()
    from_dense, from_sparse = acts.clone(), acts.clone()
    want = sae.decode(from_dense.requires_grad_())
    got = sae.decode(from_sparse.requires_grad_().to_sparse_coo())
    assert got.shape == (*shape, 10)
    assert_close(got, want)
    weights = draw(*want.shape, seed=3)
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    assert from_dense.grad is not None and from_sparse.grad is not None
    # A sparse tensor has gradients where it has entries.
    active = acts > 0
    assert_close(from_sparse.grad[active], from_dense.grad[active])


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta")
def test_decode_takes_sparse_activations_of_any_layout(
    make_either: Any, layout: torch.layout, rescale: bool
):
    sae = make_either(rescale_acts_by_decoder_norm=rescale)
    acts = sae.encode(X).detach()
    assert torch.equal(sae.decode(acts.to_sparse(layout=layout)), sae.decode(acts))


@pytest.mark.parametrize(
    ("norm", "shift"), [("constant_norm_rescale", 0.0), ("layer_norm", 2.0)]
)
def test_run_time_normalisation_is_undone_on_the_way_out(
    make_either: Any, norm: str, shift: float
):
    sae = make_either(normalize_activations=norm, aux_loss_coefficient=0.0)
    assert_close(sae.encode(3 * X + shift), sae.encode(X), atol=1e-3)
    assert_close(sae(3 * X + shift), 3 * sae(X) + shift, atol=1e-3)


def test_heads_are_joined_on_the_way_in_and_split_on_the_way_out(make: Any):
    sae = inference(make(), reshape_activations="hook_z")
    flat = inference(make())
    heads = X.view(4, 2, 2, 5)
    assert_close(sae.encode(heads), flat.encode(X).view(4, 2, 60))
    assert_close(sae(heads), flat(X).view(4, 2, 2, 5))
    assert torch.equal(sae.route(heads).indices.flatten(0, 1), flat.route(X).indices)
    sae.turn_off_forward_pass_hook_z_reshaping()
    assert_close(sae(X), flat(X))


def test_weights_travel_under_a_prefix_and_through_torch_save(
    make_either: Any, tmp_path: Path
):
    sae = make_either()
    torch.save(nn.ModuleDict({"inner": sae}).state_dict(), tmp_path / "weights.pt")
    other = type(sae)(copy.deepcopy(sae.cfg))
    assert (other(X) - sae(X)).abs().max() > 0.1
    nn.ModuleDict({"inner": other}).load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(other(X), sae(X))


def test_loading_takes_the_tensors_of_the_file_without_another_copy(
    make_either: Any, tmp_path: Path
):
    sae = make_either()
    sae.save_model(tmp_path)
    read: dict[str, torch.Tensor] = {}

    def converter(path: Any, device: str, cfg_overrides: Any = None) -> Any:
        cfg, state_dict = sae_lens_disk_loader(path, device, cfg_overrides)
        read.update(state_dict)
        return cfg, state_dict

    loaded = base_of(sae).load_from_disk(tmp_path, converter=converter)
    assert read.keys() == loaded.state_dict().keys()
    # The router's tensors, which are small, are divided where the SAE trains.
    own = {"W_router", "b_router"} if isinstance(loaded, TrainingSAE) else set()
    for name, parameter in loaded.named_parameters():
        assert (parameter.data_ptr() != read[name].data_ptr()) == (name in own)


def test_a_compiled_sae_computes_the_same_for_batches_of_any_size():
    sae = inference(scale_sae())
    torch.compiler.reset()
    # Graphs are captured as for any backend; generating code would take a minute.
    compiled = torch.compile(sae, backend="eager")
    for size in (8, 3):
        assert_close(compiled(X[:size]), sae(X[:size]))


@pytest.mark.skipif(
    torch.__version__ < TorchVersion("2.13"),
    reason="torch 2.6's jvp has no access to the tokens of each expert; 2.13's has",
)
def test_a_forward_derivative_is_that_of_finite_differences(make_either: Any):
    sae = make_either()
    x, direction = X[0], X[1]
    forward = torch.func.jvp(sae, (x,), (direction,))[1]
    assert forward.abs().max() > 0.1
    step = 1e-7 * direction
    assert_close(forward, (sae(x + step) - sae(x - step)) / 2e-7, atol=1e-4)


def test_what_saelens_deprecates_still_works(make_either: Any, tmp_path: Path):
    sae = make_either()
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "gpt2", "blocks.1.hook_z"
    assert sae.get_name() == "sae_gpt2_blocks.1.hook_z_60"
    sae.save_model(tmp_path)
    with pytest.warns(DeprecationWarning, match="load_from_disk"):
        loaded = base_of(sae).load_from_pretrained(tmp_path)
    assert torch.equal(loaded(X), sae(X))
    with pytest.warns(DeprecationWarning, match="Unpacking SAE objects"):
        itself, cfg, sparsity = sae
    assert itself is sae and cfg == sae.cfg.to_dict() and sparsity is None
    with pytest.warns(DeprecationWarning, match="Indexing SAE objects"):
        assert sae[0] is sae
    with pytest.warns(DeprecationWarning, match="length of SAE objects"):
        assert len(sae) == 3


def test_an_sae_set_to_known_features_finds_them_and_can_be_saved(
    make: Any, tmp_path: Path
):
    torch.manual_seed(0)
    sae = make(dtype="float32")
    features = FeatureDictionary(num_features=60, hidden_dim=10)
    init_sae_to_match_feature_dict(sae, features)
    assert not sae.W_dec.is_contiguous()
    result = eval_sae_on_synthetic_data(
        sae, features, ActivationGenerator(60, 0.1), num_samples=500
    )
    assert result.mcc > 0.99
    assert 0 < result.sae_l0 <= 6
    sae.training_forward_pass(step_input(X.float(), DEAD)).loss.backward()
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert_close(loaded(X.float()), sae(X.float()), atol=1e-5)

"""Demands of SAELens's own tests on its architectures, one SAE at a time."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close, scale_sae, step_input, switch_sae
from sae_lens import LanguageModelSAERunnerConfig
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

MAKERS = {"scale": scale_sae, "switch": switch_sae}
both_architectures = pytest.mark.parametrize("architecture", list(MAKERS))
both_uses = pytest.mark.parametrize("training", [True, False], ids=["train", "infer"])
X = torch.randn(8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
DEAD = torch.arange(60) % 2 == 0


def make(architecture: str, training: bool = False, **overrides: Any) -> Any:
    """A small random SAE in float64: 12 latents in each of 5 experts, k 6."""
    cfg_only_in_inference = {
        name: overrides.pop(name)
        for name in ("reshape_activations",)
        if name in overrides
    }
    sae = MAKERS[architecture](**overrides)
    if training:
        return sae
    cfg = sae.cfg.get_inference_sae_cfg_dict() | cfg_only_in_inference
    inference = SAE.from_dict(copy.deepcopy(cfg))
    inference.load_state_dict(sae.state_dict(), strict=False)
    return inference


@both_architectures
@both_uses
@pytest.mark.parametrize(
    ("args", "kwargs", "device", "dtype"),
    [
        (("meta",), {}, "meta", torch.float64),
        ((torch.device("meta"),), {}, "meta", torch.float64),
        ((torch.float16,), {}, "cpu", torch.float16),
        ((torch.device("meta"), torch.bfloat16), {}, "meta", torch.bfloat16),
        (
            (),
            {"device": "meta", "dtype": torch.float16, "non_blocking": True},
            "meta",
            torch.float16,
        ),
        (
            (torch.empty(1, device="meta", dtype=torch.float32),),
            {},
            "meta",
            torch.float32,
        ),
        ((), {}, "cpu", torch.float64),
    ],
    ids=str,
)
def test_moving_takes_every_parameter_and_the_config_along(
    architecture: str,
    training: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: str,
    dtype: torch.dtype,
):
    sae = make(architecture, training)
    assert sae.to(*args, **kwargs) is sae
    assert (sae.device, sae.dtype) == (torch.device(device), dtype)
    assert (sae.cfg.device, f"torch.{sae.cfg.dtype}") == (device, str(dtype))
    for parameter in sae.parameters():
        assert (parameter.device.type, parameter.dtype) == (device, dtype)
    if device == "cpu":
        assert sae(X).dtype == dtype


@both_architectures
@pytest.mark.parametrize("decoder_init_norm", [0.1, 0.7, None])
def test_a_fresh_training_sae_starts_tied_with_the_asked_decoder_norm(
    architecture: str, decoder_init_norm: float | None
):
    cfg = make(architecture, True, decoder_init_norm=decoder_init_norm).cfg
    sae = TrainingSAE.from_dict(cfg.to_dict())
    norms = sae.W_dec.norm(dim=-1)
    if decoder_init_norm is None:
        assert norms.std() > 0.01
    else:
        assert_close(norms, torch.full_like(norms, decoder_init_norm))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert sae.W_enc.is_contiguous()
    for name in ("b_enc", "b_dec", "b_router"):
        assert not getattr(sae, name).any()
    # A router of zeros would send every token to the same experts.
    assert sae.route(X).indices.unique().numel() > 2  # type: ignore[operator]


@both_architectures
@both_uses
@pytest.mark.parametrize("shape", [(), (4,), (4, 5), (4, 5, 6), (4, 5, 6, 7)])
@pytest.mark.parametrize("rescale", [True, False])
def test_decode_takes_sparse_activations_of_any_shape(
    architecture: str, training: bool, shape: tuple[int, ...], rescale: bool
):
    sae = make(architecture, training, rescale_acts_by_decoder_norm=rescale)
    generator = torch.Generator().manual_seed(2)
    acts = torch.randn(*shape, 60, dtype=torch.float64, generator=generator).relu()
    from_dense, from_sparse = acts.clone(), acts.clone()
    want = sae.decode(from_dense.requires_grad_())
    got = sae.decode(from_sparse.requires_grad_().to_sparse_coo())
    assert got.shape == (*shape, 10)
    assert_close(got, want)
    weights = torch.randn(want.shape, dtype=torch.float64, generator=generator)
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    assert from_dense.grad is not None and from_sparse.grad is not None
    # A sparse tensor has gradients where it has entries.
    active = acts > 0
    assert_close(from_sparse.grad[active], from_dense.grad[active])


@both_architectures
@both_uses
def test_rescaling_by_decoder_norm_is_nothing_but_a_unit_norm_decoder(
    architecture: str, training: bool
):
    with_rescaling = make(architecture, training, rescale_acts_by_decoder_norm=True)
    with_rescaling.fold_W_dec_norm()
    without = make(architecture, training, rescale_acts_by_decoder_norm=False)
    without.load_state_dict(with_rescaling.state_dict())
    assert_close(with_rescaling.encode(X), without.encode(X))
    assert_close(with_rescaling(X), without(X))
    # A common factor changes activations, and neither the selection nor the output.
    for sae in (with_rescaling, without):
        sae.W_dec.data *= 0.5
    assert_close(with_rescaling.encode(X), 0.5 * without.encode(X))
    assert_close(with_rescaling(X), without(X))


@both_architectures
@both_uses
def test_rescaling_matters_only_where_topk_drops_candidates(
    architecture: str, training: bool
):
    candidates = {"scale": 24, "switch": 12}[architecture]
    outputs = {}
    for k in (2, candidates):
        outputs[k] = [
            make(architecture, training, k=k, rescale_acts_by_decoder_norm=rescale)(X)
            for rescale in (True, False)
        ]
    assert_close(*outputs[candidates])
    assert (outputs[2][0] - outputs[2][1]).abs().max() > 0.1


@both_architectures
@both_uses
@pytest.mark.parametrize(
    ("norm", "shift"), [("constant_norm_rescale", 0.0), ("layer_norm", 2.0)]
)
def test_run_time_normalisation_is_undone_on_the_way_out(
    architecture: str, training: bool, norm: str, shift: float
):
    sae = make(
        architecture, training, normalize_activations=norm, aux_loss_coefficient=0.0
    )
    assert_close(sae.encode(3 * X + shift), sae.encode(X), atol=1e-3)
    assert_close(sae(3 * X + shift), 3 * sae(X) + shift, atol=1e-3)


@both_architectures
def test_heads_are_joined_on_the_way_in_and_split_on_the_way_out(architecture: str):
    sae = make(architecture, reshape_activations="hook_z")
    flat = make(architecture)
    heads = X.view(4, 2, 2, 5)
    assert_close(sae.encode(heads), flat.encode(X).view(4, 2, 60))
    assert_close(sae(heads), flat(X).view(4, 2, 2, 5))
    assert torch.equal(sae.route(heads).indices.flatten(0, 1), flat.route(X).indices)
    sae.turn_off_forward_pass_hook_z_reshaping()
    assert_close(sae(X), flat(X))


@both_architectures
@both_uses
def test_with_the_error_term_each_hook_fires_once_and_the_error_is_the_clean_one(
    architecture: str, training: bool
):
    sae = make(architecture, training)
    with pytest.warns(DeprecationWarning, match="use_error_term"):
        sae.use_error_term = True
    fired: list[str] = []
    names = [name for name in sae.hook_dict]
    sae.run_with_hooks(
        X, fwd_hooks=[(n, lambda value, hook: fired.append(hook.name)) for n in names]
    )
    assert sorted(fired) == sorted(names)
    _, clean = sae.run_with_cache(X)
    with sae.hooks([("hook_sae_acts_post", lambda a, hook: torch.full_like(a, 20.0))]):
        edited_out, edited = sae.run_with_cache(X)
    assert (edited["hook_sae_acts_post"] == 20).all()
    assert torch.equal(edited["hook_sae_error"], clean["hook_sae_error"])
    assert_close(edited["hook_sae_error"], X - sae.decode(sae.encode(X)))
    assert (edited_out - X).abs().max() > 1


@both_architectures
@both_uses
def test_weights_travel_under_a_prefix_and_through_torch_save(
    architecture: str, training: bool, tmp_path: Path
):
    sae = make(architecture, training)
    torch.save(nn.ModuleDict({"inner": sae}).state_dict(), tmp_path / "weights.pt")
    other = type(sae)(copy.deepcopy(sae.cfg))
    assert (other(X) - sae(X)).abs().max() > 0.1
    nn.ModuleDict({"inner": other}).load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(other(X), sae(X))


@both_architectures
@both_uses
def test_loading_takes_the_tensors_of_the_file_without_another_copy(
    architecture: str, training: bool, tmp_path: Path
):
    make(architecture, training).save_model(tmp_path)
    read: dict[str, torch.Tensor] = {}

    def converter(path: Any, device: str, cfg_overrides: Any = None) -> Any:
        cfg, state_dict = sae_lens_disk_loader(path, device, cfg_overrides)
        read.update(state_dict)
        return cfg, state_dict

    loaded = (TrainingSAE if training else SAE).load_from_disk(
        tmp_path, converter=converter
    )
    assert read.keys() == loaded.state_dict().keys()
    for name, parameter in loaded.named_parameters():
        assert parameter.data_ptr() == read[name].data_ptr()


def test_a_compiled_sae_computes_the_same_for_batches_of_any_size():
    sae = make("scale")
    torch.compiler.reset()
    # Graphs are captured as for any backend; generating code would take a minute.
    compiled = torch.compile(sae, backend="eager")
    for size in (8, 3):
        assert_close(compiled(X[:size]), sae(X[:size]))


@pytest.mark.skipif(
    torch.__version__ < TorchVersion("2.13"),
    reason="torch 2.6's jvp has no access to the tokens of each expert; 2.13's has",
)
@both_architectures
@both_uses
def test_forward_and_reverse_derivatives_agree(architecture: str, training: bool):
    sae = make(architecture, training)
    x, direction = X[0], X[1]
    forward = torch.func.jvp(sae, (x,), (direction,))[1]
    jacobian = torch.func.jacrev(sae)(x)
    assert jacobian.abs().max() > 0.1
    assert_close(forward, jacobian @ direction)
    step = 1e-7 * direction
    finite = (sae(x + step) - sae(x - step)) / 2e-7
    assert_close(forward, finite, atol=1e-4)


@both_architectures
@both_uses
def test_an_sae_of_a_single_latent_works_and_folds(architecture: str, training: bool):
    sizes = {"d_sae": 1, "num_experts": 1, "k": 1}
    if architecture == "scale":
        sizes["experts_per_token"] = 1
    sae = make(architecture, training, **sizes)
    sae.b_enc.data += 10
    want = sae(X)
    shapes = {name: p.shape for name, p in sae.named_parameters()}
    sae.fold_W_dec_norm()
    sae.fold_activation_norm_scaling_factor(2.0)
    assert {name: p.shape for name, p in sae.named_parameters()} == shapes
    assert_close(2 * sae(X / 2), want)


@both_architectures
@both_uses
def test_what_saelens_deprecates_still_works(
    architecture: str, training: bool, tmp_path: Path
):
    sae = make(architecture, training)
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "gpt2", "blocks.1.hook_z"
    assert sae.get_name() == "sae_gpt2_blocks.1.hook_z_60"
    sae.save_model(tmp_path)
    with pytest.warns(DeprecationWarning, match="load_from_disk"):
        loaded = (TrainingSAE if training else SAE).load_from_pretrained(tmp_path)
    assert torch.equal(loaded(X), sae(X))
    with pytest.warns(DeprecationWarning, match="Unpacking SAE objects"):
        itself, cfg, sparsity = sae
    assert itself is sae and cfg == sae.cfg.to_dict() and sparsity is None
    with pytest.warns(DeprecationWarning, match="Indexing SAE objects"):
        assert sae[0] is sae
    with pytest.warns(DeprecationWarning, match="length of SAE objects"):
        assert len(sae) == 3


@both_architectures
def test_configs_survive_json_pickle_and_copies(architecture: str):
    cfg = make(architecture, True, load_balance_coefficient=0.5).cfg
    cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    runner = LanguageModelSAERunnerConfig(
        sae=cfg, model_name="gpt2", hook_name=cfg.metadata.hook_name
    )
    written = json.loads(json.dumps(runner.to_dict()))
    again = LanguageModelSAERunnerConfig.from_dict(written).sae
    for other in (again, pickle.loads(pickle.dumps(cfg)), copy.deepcopy(cfg)):
        assert type(other) is type(cfg)
        assert other.to_dict() == cfg.to_dict()
    changed = dataclasses.replace(cfg, k=3)
    assert (changed.k, cfg.k) == (3, 6)
    with pytest.raises(ValueError, match="k must be at most"):
        dataclasses.replace(cfg, k=61)


@both_architectures
def test_an_sae_set_to_known_features_finds_them_and_can_be_saved(
    architecture: str, tmp_path: Path
):
    torch.manual_seed(0)
    sae = make(architecture, True, dtype="float32")
    features = FeatureDictionary(num_features=60, hidden_dim=10)
    init_sae_to_match_feature_dict(sae, features)
    assert not sae.W_dec.is_contiguous()
    result = eval_sae_on_synthetic_data(
        sae, features, ActivationGenerator(60, 0.1), num_samples=500
    )
    assert result.mcc > 0.99
    assert 0 < result.sae_l0 <= 6
    step = sae.training_forward_pass(step_input(X.float(), DEAD))
    step.loss.backward()
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert_close(loaded(X.float()), sae(X.float()), atol=1e-5)

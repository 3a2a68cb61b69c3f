"""Activations that an SAE reads: of heads, in parts, finite."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import HookedSAETransformer
from sae_lens.saes.temporal_sae import TemporalSAE, TemporalSAEConfig

from sae_lens_scale.analysis import activations as module
from sae_lens_scale.analysis.activations import (
    encode_in_parts,
    finite_batches,
    hook_activations,
    into_heads,
    of_heads,
    require_finite,
)

Z = torch.arange(2.0 * 3 * 4 * 8).view(2, 3, 4, 8)


def test_models_of_all_kinds_are_read_up_to_the_hook(
    kind: Any, make_sae: Any, make_tokens: Any
):
    sae, tokens = make_sae(hook=kind.hook), make_tokens()
    x = hook_activations(kind.model, sae, kind.own_hook, tokens)
    _, cache = kind.model.run_with_cache(tokens, names_filter=[kind.own_hook])
    assert x.shape == (7, 16, 32)
    torch.testing.assert_close(x, cache[kind.own_hook])


def test_heads_are_joined_or_one_is_taken_and_put_back(make_sae: Any):
    joined = make_sae()
    assert torch.equal(of_heads(joined, Z, "z", 32), Z.view(2, 3, 32))
    assert torch.equal(into_heads(joined, Z, -Z.view(2, 3, 32)), -Z)
    one = make_sae(d_in=8)
    # The second from the end, in SAELens's own indexing too.
    for head in (2, -2):
        one.cfg.metadata.hook_head_index = head
        assert torch.equal(of_heads(one, Z, "z", 8), Z[:, :, 2])
    before = Z.clone()
    new = into_heads(one, Z, torch.zeros(2, 3, 8))
    assert torch.equal(Z, before)
    assert not new[:, :, 2].any()
    assert torch.equal(new[:, :, [0, 1, 3]], Z[:, :, [0, 1, 3]])


@pytest.mark.parametrize(
    ("head", "x", "message"),
    [
        (4, Z, "hook_head_index must be one of the 4 heads at z, got 4"),
        (-5, Z, "hook_head_index must be one of the 4 heads at z, got -5"),
        (0, Z.flatten(2), "hook_head_index must be one of the 0 heads at z, got 0"),
        (0, Z, "the SAE must be as wide as the model at z, 8, got 32"),
        (None, Z[..., 0], "the SAE must be as wide as the model at z, 4, got 32"),
    ],
)
def test_activations_of_other_heads_or_widths_are_refused(
    make_sae: Any, head: int | None, x: torch.Tensor, message: str
):
    sae = make_sae()
    sae.cfg.metadata.hook_head_index = head
    with pytest.raises(ValueError, match=message):
        of_heads(sae, x, "z", 32)


@torch.no_grad()
def test_tokens_that_are_not_finite_have_no_feature_activations(make_sae: Any):
    sae = make_sae("standard")
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    # Infinite, its product with encoder weights of one sign is, and ReLU hides the others.
    x[0, 1, 5] = torch.inf
    sae.W_enc.data[5] = -1
    (acts,) = encode_in_parts(sae, x)
    assert acts[1].isnan().all()
    assert acts[[0, 2, 3, 4, 5]].isfinite().all()
    sae.b_enc.data[7] = torch.inf
    (acts,) = encode_in_parts(sae, x)
    assert acts.isnan().all()


@torch.no_grad()
def test_a_temporal_SAE_reads_whole_passages(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    cfg = TemporalSAEConfig(d_in=32, d_sae=64, bottleneck_factor=1, kval_topk=6)
    sae = TemporalSAE(cfg)
    x = torch.randn(3, 5, 32)
    monkeypatch.setattr(module, "_MAX_ACTIVATIONS", 64)
    acts = torch.cat(list(encode_in_parts(sae, x)))
    torch.testing.assert_close(acts.view(3, 5, 64), sae.encode(x))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_refused_by_batch_and_token(
    bad: float, dtype: torch.dtype
):
    x = torch.full((2, 3, 4), 60_000.0, dtype=dtype)
    require_finite("x", x, 0)
    x[1, 2, 0] = bad
    with pytest.raises(
        ValueError, match=r"x must be finite.*batch 7, at token \(1, 2\)"
    ):
        require_finite("x", x, 7)
    with pytest.raises(ValueError, match="batch 0, at token 5"):
        require_finite("x", x.flatten(0, 1), 0)
    ignored = torch.zeros(2, 3, dtype=torch.bool)
    ignored[1, 2] = True
    require_finite("x", x, 0, ignored)
    # Of tokens on which nothing fires.
    require_finite("x", x[..., :0], 0)


def test_batches_may_be_arrays_and_must_be_numbers(make_sae: Any):
    sae = make_sae("topk", d_in=4)
    x: Any = np.arange(12.0).reshape(3, 4)
    (found,) = finite_batches([x], sae)
    assert found.tolist() == x.tolist()
    rows = list(finite_batches(torch.from_numpy(x), sae))
    assert [row.tolist() for row in rows] == x.tolist()
    wrong: list[Any] = [None, ["x"], [{"x": 1}], [[[1.0], [2.0, 3.0]]]]
    for bad in wrong:
        with pytest.raises(ValueError, match="activations must be .* got"):
            list(finite_batches(bad, sae))


@pytest.mark.parametrize("x", [torch.ones(3, n) for n in (0, 1, 5)])
def test_batches_of_another_width_are_refused(make_sae: Any, x: torch.Tensor):
    message = rf"activations must be .* \[..., d_in=4\], got .*\(3, {x.shape[1]}\)"
    for architecture in ("scale", "topk"):
        with pytest.raises(ValueError, match=message):
            list(finite_batches([x], make_sae(architecture, d_in=4)))


def test_batches_of_complex_numbers_or_of_no_dimension_are_refused(make_sae: Any):
    for x in (torch.ones(3, 4, dtype=torch.complex64), torch.ones(4)):
        with pytest.raises(ValueError, match="activations must be real numbers .* got"):
            list(finite_batches([x] if x.is_complex() else x, make_sae(d_in=4)))


def test_heads_of_batches_are_joined_for_an_SAE_of_hook_z_only(make_sae: Any):
    sae = make_sae(hook="blocks.0.attn.hook_z")
    with pytest.raises(ValueError, match=r"got .* of shape \(2, 3, 4, 8\)"):
        list(finite_batches([Z], sae))
    sae.turn_on_forward_pass_hook_z_reshaping()
    for x in (Z, Z.view(2, 3, 32)):
        (found,) = finite_batches([x], sae)
        assert torch.equal(found, Z.view(2, 3, 32))


def test_a_hook_that_is_not_of_each_token_or_never_reached_is_refused(
    tiny_model: HookedSAETransformer, make_sae: Any, make_tokens: Any
):
    def first_passage(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x[:1]

    sae, tokens = make_sae(hook="hook_embed"), make_tokens()
    with (
        tiny_model.hooks(fwd_hooks=[("hook_embed", first_passage)]),
        pytest.raises(
            ValueError, match=r"at hook_embed must be .*\(7, 16\), got .*\(1,"
        ),
    ):
        hook_activations(tiny_model, sae, "hook_embed", tokens)
    with pytest.raises(ValueError, match="hook_name must be .* got 'blocks.0.hook_ml"):
        hook_activations(tiny_model, sae, "blocks.0.hook_mlp_in", tokens)


def test_all_of_a_hook_is_read_even_if_SAEs_are_spliced_elsewhere(
    tiny_model: HookedSAETransformer, make_sae: Any, make_tokens: Any
):
    first, second = make_sae(), make_sae(hook="blocks.1.hook_resid_post")
    tokens = make_tokens()
    plain = hook_activations(tiny_model, second, second.cfg.metadata.hook_name, tokens)
    with tiny_model.saes([first]):
        spliced = hook_activations(
            tiny_model, second, second.cfg.metadata.hook_name, tokens
        )
    assert not torch.allclose(plain, spliced)

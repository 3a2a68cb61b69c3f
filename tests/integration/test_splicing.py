"""
Spliced into a language model, our SAEs do all that SAELens's own do.

On a HookedSAETransformer and on a SAETransformerBridge, which needs transformer-lens 3.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import reconstruct
from integration.runs import (
    ARCHITECTURES,
    NORMALIZED,
    both_architectures,
    exported,
    make_runner,
    new_sae,
    runner_config,
    sae_config,
)
from integration.splicing import (
    PROMPTS,
    SIZE,
    N,
    assert_differ,
    clean_activations,
    hooks_of_sae,
    replaced_by,
    resid_post,
    restore_hook_names,
    shapes,
    shapes_inside,
    suited_sae,
    unselected_expert,
)
from sae_lens import SAE, HookedSAETransformer

with_and_without_error_term = pytest.mark.parametrize("use_error_term", [False, True])
# A bridge has no start_at_layer, generates otherwise with a cache of keys than without, has
# its norms in float32, and the defects of docs/upstream/saetransformerbridge.md.
hooked_transformer_only = pytest.mark.parametrize(
    "model_in", ["HookedSAETransformer"], indirect=True
)


@pytest.fixture(scope="module", params=["HookedSAETransformer", "SAETransformerBridge"])
def model_in(
    request: pytest.FixtureRequest, tiny_model: HookedSAETransformer, tiny_llama: Path
) -> Callable[..., Any]:
    """Maker of one kind of language model in the dtype that it is given."""
    if request.param == "SAETransformerBridge":
        pytest.importorskip("transformer_lens.model_bridge")
        from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

        return partial(SAETransformerBridge.boot_transformers, str(tiny_llama))

    def make(dtype: torch.dtype) -> HookedSAETransformer:
        cfg = copy.deepcopy(tiny_model.cfg)
        cfg.dtype = dtype
        return HookedSAETransformer(cfg, tiny_model.tokenizer).eval()

    return make


@pytest.fixture(scope="module")
def model(model_in: Callable[..., Any]) -> Any:
    return model_in(dtype=torch.float32)


@pytest.fixture(scope="module")
def double_model(model_in: Callable[..., Any]) -> Any:
    """The same in float64, for finite differences."""
    return model_in(dtype=torch.float64)


@pytest.fixture(
    scope="module",
    params=[(a, kind) for a in ARCHITECTURES for kind in ("inference", "training")],
    ids="-".join,
)
def sae(
    request: pytest.FixtureRequest,
    model: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> SAE[Any]:
    architecture, kind = request.param
    sae = suited_sae(architecture, model)
    return sae if kind == "training" else exported(sae, tmp_path_factory.mktemp("sae"))


def is_hooked(point: Any) -> bool:
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return any(getattr(point, f"_{kind}_hooks") for kind in kinds)


@pytest.fixture(autouse=True)
def nothing_stays_attached(request: pytest.FixtureRequest) -> Iterator[None]:
    names = {"model", "double_model"} & set(request.fixturenames)
    models = [request.getfixturevalue(name) for name in names]
    yield
    for model in models:
        attached = model.acts_to_saes
        hooks = [name for name, point in model.hook_dict.items() if is_hooked(point)]
        model.reset_saes()
        restore_hook_names(model)
        assert not attached and not hooks


@pytest.fixture
def tokens(model: Any) -> torch.Tensor:
    return model.to_tokens(PROMPTS)


@torch.no_grad()
def test_every_way_of_splicing_replaces_activations_with_reconstructions(
    sae: SAE[Any], model: Any, tokens: torch.Tensor
):
    hook = resid_post(model)
    clean = model(tokens)
    want = replaced_by(model, tokens, {hook: sae})
    assert_differ(want, clean)
    assert torch.equal(model.run_with_saes(tokens, saes=[sae]), want)
    # A single SAE, and text, will do too.
    assert torch.equal(model.run_with_saes(PROMPTS, saes=sae), want)
    assert torch.equal(model.run_with_cache_with_saes(tokens, saes=[sae])[0], want)
    seen: list[torch.Tensor] = []
    hooks = [(f"{hook}.hook_expert_indices", lambda x, hook: seen.append(x))]
    out = model.run_with_hooks_with_saes(tokens, saes=[sae], fwd_hooks=hooks)
    assert torch.equal(out, want)
    assert len(seen) == 1
    with model.saes(saes=[sae]):
        assert torch.equal(model(tokens), want)
    assert torch.equal(model(tokens), clean)
    model.add_sae(sae)
    assert torch.equal(model(tokens), want)
    model.reset_saes(hook)
    assert torch.equal(model(tokens), clean)
    loss = model.run_with_saes(tokens, saes=[sae], return_type="loss")
    torch.testing.assert_close(loss, model.loss_fn(want, tokens))


@torch.no_grad()
def test_with_the_error_term_logits_are_the_clean_models_and_all_hooks_are_cached(
    sae: SAE[Any], model: Any, tokens: torch.Tensor
):
    hook = resid_post(model)
    logits, cache = model.run_with_cache_with_saes(
        tokens, saes=[sae], use_error_term=True
    )
    torch.testing.assert_close(logits, model(tokens), atol=1e-5, rtol=0)
    x = clean_activations(model, tokens)
    shown = hooks_of_sae(cache, hook)
    assert shapes(shown) == {
        **shapes_inside(sae, *tokens.shape),
        "hook_sae_error": (*tokens.shape, 32),
    }
    assert torch.equal(shown["hook_sae_input"], x)
    assert torch.equal(shown["hook_expert_indices"], sae.route(x).indices)  # type: ignore[operator]
    assert torch.equal(shown["hook_sae_acts_post"], sae.encode(x))
    assert torch.equal(shown["hook_sae_recons"], reconstruct(sae, x))
    assert torch.equal(shown["hook_sae_error"], x - reconstruct(sae, x))
    torch.testing.assert_close(shown["hook_sae_output"], x)
    # More than one expert is at work, or these tests would show little.
    assert shown["hook_expert_indices"].unique().numel() > 1

    post = f"{hook}.hook_sae_acts_post"
    _, only = model.run_with_cache_with_saes(
        tokens[:1], saes=[sae], names_filter=post, remove_batch_dim=True
    )
    assert list(only) == [post]
    torch.testing.assert_close(only[post], shown["hook_sae_acts_post"][0])


@torch.no_grad()
@both_architectures
@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
def test_run_time_normalization_survives_the_error_term(
    model: Any, tokens: torch.Tensor, architecture: str, normalization: str
):
    sae = suited_sae(
        architecture,
        model,
        normalize_activations=normalization,
        aux_loss_coefficient=0.0,
    )
    want = replaced_by(model, tokens, {resid_post(model): sae})
    assert torch.equal(model.run_with_saes(tokens, saes=[sae]), want)
    out = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
    torch.testing.assert_close(out, model(tokens), atol=1e-5, rtol=0)


@torch.no_grad()
@with_and_without_error_term
def test_steering_a_latent_of_an_unselected_expert_moves_the_logits_by_its_decoder_row(
    sae: SAE[Any], model: Any, tokens: torch.Tensor, use_error_term: bool
):
    hook = resid_post(model)
    x = clean_activations(model, tokens)
    latent = unselected_expert(sae, x) * SIZE + 3
    direction = sae.W_dec[latent]
    if sae.cfg.rescale_acts_by_decoder_norm:
        direction = direction / direction.norm()

    def steer(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        assert (acts[0, -1, latent] == 0).all()
        acts[..., latent] += 0.1
        return acts

    with model.saes(saes=[sae], use_error_term=use_error_term):
        plain = model(tokens)
        steered = model.run_with_hooks(
            tokens, fwd_hooks=[(f"{hook}.hook_sae_acts_post", steer)]
        )
    base = x if use_error_term else sae(x)
    want = replaced_by(model, tokens, {hook: lambda _: base + 0.1 * direction})
    torch.testing.assert_close(steered, want, atol=1e-4, rtol=0)
    assert_differ(steered[0, -1], plain[0, -1])


@torch.no_grad()
@pytest.mark.parametrize("topk_over", ["activations", "gated_activations"])
def test_the_model_loses_experts_that_a_hook_ablates_and_uses_those_that_one_forces(
    topk_over: str,
    sae: Any,
    model: Any,
    tokens: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(sae.cfg, "topk_over", topk_over)
    hook = resid_post(model)
    x = clean_activations(model, tokens)
    clean, indices = sae.encode(x).unflatten(-1, (N, SIZE)), sae.route(x).indices
    ablated, forced = int(indices[0, -1, 0]), unselected_expert(sae, x)
    chosen = [forced, *(i for i in range(N) if i != forced)][: indices.shape[-1]]

    def ablate(weights: torch.Tensor, hook: Any) -> torch.Tensor:
        return weights.masked_fill(indices == ablated, 0.0)

    def force(indices: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.tensor(chosen).expand_as(indices).clone()

    edited = {}
    for name, edit in (("hook_expert_weights", ablate), ("hook_expert_indices", force)):
        with model.saes(saes=[sae]):
            plain = model(tokens)
            with model.hooks(fwd_hooks=[(f"{hook}.{name}", edit)]):
                logits, cache = model.run_with_cache(tokens)
        with sae.hooks([(name, edit)]):
            acts, recons = sae.encode(x), sae(x)
        assert torch.equal(cache[f"{hook}.hook_sae_acts_post"], acts)
        want = replaced_by(model, tokens, {hook: lambda _, recons=recons: recons})
        torch.testing.assert_close(logits, want)
        assert_differ(logits, plain)
        edited[name] = acts.unflatten(-1, (N, SIZE))

    acts = edited["hook_expert_weights"]
    assert acts.any() and not acts[..., ablated, :].any()
    # Ranked after the gate, latents of a token's other experts take their places.
    without = clean.index_fill(-2, torch.tensor([ablated]), 0.0)
    others = topk_over == "gated_activations" and len(chosen) > 1
    assert torch.equal(acts, without) == (not others)
    acts = edited["hook_expert_indices"]
    assert acts[..., forced, :].any()
    assert acts[..., chosen, :].count_nonzero() == acts.count_nonzero()


@hooked_transformer_only
@both_architectures
@with_and_without_error_term
def test_attribution_to_latents_matches_finite_differences(
    double_model: Any, architecture: str, use_error_term: bool
):
    model, post = double_model, f"{resid_post(double_model)}.hook_sae_acts_post"
    sae = suited_sae(architecture, model, dtype="float64")
    tokens = model.to_tokens(PROMPTS)
    with model.saes(saes=[sae], use_error_term=use_error_term):
        _, cache = model.run_with_cache(tokens, incl_bwd=True, return_type="loss")

        @torch.no_grad()
        def loss(where: tuple[int, int, int], step: float) -> torch.Tensor:
            def shift(acts: torch.Tensor, hook: Any) -> torch.Tensor:
                acts[where] += step
                return acts

            return model.run_with_hooks(
                tokens, return_type="loss", fwd_hooks=[(post, shift)]
            )

        acts, grads = cache[post], cache[f"{post}_grad"]
        x = cache[f"{resid_post(model)}.hook_sae_input"]
        latents = [int(acts[0, 4].argmax()), unselected_expert(sae, x) * SIZE + 3]
        for latent in latents:
            where = (0, 4, latent)
            slope = (loss(where, 1e-4) - loss(where, -1e-4)) / 2e-4
            assert slope.abs() > 1e-5
            torch.testing.assert_close(grads[where], slope, atol=1e-9, rtol=1e-4)
    model.zero_grad(set_to_none=True)


@hooked_transformer_only
@both_architectures
def test_gradients_flow_through_encoder_router_and_gates_to_the_embedding(
    double_model: Any, architecture: str
):
    model = double_model
    sae = suited_sae(architecture, model, dtype="float64", gate="softmax")
    tokens = model.to_tokens(PROMPTS)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(*tokens.shape, 32, generator=generator).double()
    with model.saes(saes=[sae]):
        _, cache = model.run_with_cache(tokens, incl_bwd=True, return_type="loss")
        plus, minus = (
            replaced_by(
                model,
                tokens,
                {"hook_embed": lambda x, step=step: x + step * direction},
                return_type="loss",
            )
            for step in (1e-6, -1e-6)
        )
    slope = (plus - minus) / 2e-6
    assert slope.abs() > 1e-3
    torch.testing.assert_close(
        (cache["hook_embed_grad"] * direction).sum(), slope, atol=1e-8, rtol=1e-5
    )
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    model.zero_grad(set_to_none=True)


@torch.no_grad()
@with_and_without_error_term
def test_saes_of_several_architectures_share_a_model(
    model: Any, tokens: torch.Tensor, tmp_path: Path, use_error_term: bool
):
    clean = model(tokens)
    last = resid_post(model, layer=1)
    mlp = "blocks.1.hook_mlp_out" if "hook_resid" in last else "blocks.1.mlp.hook_out"
    saes = [
        exported(suited_sae("scale", model), tmp_path / "scale"),
        exported(suited_sae("switch", model, mlp), tmp_path / "switch"),
        exported(new_sae("topk", last), tmp_path / "topk"),
    ]
    out, cache = model.run_with_cache_with_saes(
        tokens, saes=saes, use_error_term=use_error_term
    )
    hooks = [sae.cfg.metadata.hook_name for sae in saes]
    for hook in hooks:
        assert f"{hook}.hook_sae_acts_post" in cache
    if use_error_term:
        torch.testing.assert_close(out, clean, atol=1e-5, rtol=0)
        return
    want = replaced_by(model, tokens, dict(zip(hooks, saes, strict=True)))
    assert torch.equal(out, want)
    with_topk_only = replaced_by(model, tokens, {last: saes[2]})
    for sae in saes:
        model.add_sae(sae)
    model.reset_saes(hooks[:2])
    assert torch.equal(model(tokens), with_topk_only)
    model.reset_saes()
    assert torch.equal(model(tokens), clean)


@torch.no_grad()
def test_at_one_hook_the_last_sae_wins_and_the_attached_one_comes_back(
    model: Any, tokens: torch.Tensor
):
    hook = resid_post(model)
    scale, switch = (suited_sae(architecture, model) for architecture in ARCHITECTURES)
    clean = model(tokens)
    with_scale = replaced_by(model, tokens, {hook: scale})
    with_switch = replaced_by(model, tokens, {hook: switch})
    assert_differ(with_scale, with_switch)
    assert torch.equal(model.run_with_saes(tokens, saes=[switch, scale]), with_scale)
    model.add_sae(scale, use_error_term=True)
    assert torch.equal(model.run_with_saes(tokens, saes=[switch]), with_switch)
    assert model.acts_to_saes == {hook: scale}
    torch.testing.assert_close(model(tokens), clean, atol=1e-5, rtol=0)
    model.reset_saes()


@torch.no_grad()
@hooked_transformer_only
@with_and_without_error_term
def test_special_tokens_and_chosen_tokens_bypass_the_sae(
    sae: SAE[Any], model: Any, use_error_term: bool
):
    hook = resid_post(model)
    tokens = model.to_tokens(PROMPTS[:2], padding_side="left")
    bos, pad = model.tokenizer.bos_token_id, model.tokenizer.pad_token_id
    chosen = int(tokens[0, 4])
    x = clean_activations(model, tokens)
    for exclude, ids in ((True, [bos, pad]), ([chosen], [chosen])):
        bypassed = torch.isin(tokens, torch.tensor(ids))
        assert 0 < bypassed.sum() < bypassed.numel()
        out, cache = model.run_with_cache_with_saes(
            tokens,
            saes=[sae],
            exclude_special_tokens=exclude,
            use_error_term=use_error_term,
        )
        want = torch.where(bypassed[..., None] | use_error_term, x, sae(x))
        torch.testing.assert_close(cache[f"{hook}.hook_sae_output"], want)
        if use_error_term:
            error = cache[f"{hook}.hook_sae_error"]
            assert not error[bypassed].any()
            assert error[~bypassed].any(-1).all()
        torch.testing.assert_close(
            out, replaced_by(model, tokens, {hook: lambda _, want=want: want})
        )


@torch.no_grad()
def test_left_padded_prompts_give_what_each_prompt_gives_alone(
    sae: SAE[Any], model: Any
):
    batch = model.run_with_saes(PROMPTS, saes=[sae], padding_side="left")
    for logits, prompt in zip(batch, PROMPTS, strict=True):
        alone = model.run_with_saes(prompt, saes=[sae])
        torch.testing.assert_close(logits[-1], alone[0, -1], atol=1e-4, rtol=0)


@torch.no_grad()
@hooked_transformer_only
def test_splicing_works_when_the_model_starts_or_stops_at_a_layer(
    sae: SAE[Any], model: Any, tokens: torch.Tensor
):
    residual = model.run_with_saes(tokens, saes=[sae], stop_at_layer=1)
    clean = clean_activations(model, tokens)
    assert torch.equal(residual, reconstruct(sae, clean))
    # Layer 0 and its SAE are left out.
    after = model.run_with_saes(residual, saes=[sae], start_at_layer=1)
    assert torch.equal(after, model.run_with_saes(tokens, saes=[sae]))


@torch.no_grad()
@both_architectures
@pytest.mark.parametrize(
    ("model_in", "model_dtype", "sae_dtype"),
    [
        ("HookedSAETransformer", "bfloat16", "bfloat16"),
        ("SAETransformerBridge", "bfloat16", "bfloat16"),
        ("HookedSAETransformer", "bfloat16", "float32"),
        ("HookedSAETransformer", "float32", "bfloat16"),
    ],
    indirect=["model_in"],
)
def test_splicing_keeps_the_dtypes_of_model_and_sae(
    model_in: Callable[..., Any], architecture: str, model_dtype: str, sae_dtype: str
):
    dtype = getattr(torch, model_dtype)
    model = model_in(dtype=dtype)
    sae = suited_sae(architecture, model, dtype=sae_dtype)
    hook = resid_post(model)
    tokens = model.to_tokens(PROMPTS)
    clean = model(tokens)
    out, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    assert out.dtype == clean.dtype == dtype
    assert cache[f"{hook}.hook_sae_acts_post"].dtype == sae.dtype
    assert cache[f"{hook}.hook_expert_indices"].dtype == torch.int64
    assert torch.equal(out, replaced_by(model, tokens, {hook: sae}))
    assert_differ(out, clean)
    # Only rounding in bfloat16 is left.
    with_error = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
    assert (with_error - clean).norm() < 0.05 * (out - clean).norm()


@torch.no_grad()
@hooked_transformer_only
def test_a_spliced_model_generates_alike_with_and_without_a_cache_of_keys(
    sae: SAE[Any], model: Any
):
    tokens = model.to_tokens(PROMPTS[0])
    with model.saes(saes=[sae]):
        with_cache, without = (
            model.generate(
                tokens,
                max_new_tokens=4,
                do_sample=False,
                stop_at_eos=False,
                use_past_kv_cache=use_past_kv_cache,
                verbose=False,
            )
            for use_past_kv_cache in (True, False)
        )
        greedy = model(without[:, :-1])[:, -4:].argmax(-1)
    assert torch.equal(with_cache, without)
    assert torch.equal(without[:, -4:], greedy)


HOOK_Z = "blocks.0.attn.hook_z"


def trained_on_hook_z(
    architecture: str,
    model: Any,
    output: Path,
    hook_head_index: int | None = None,
    **overrides: Any,
) -> SAE[Any]:
    """Export of an SAE that SAELens's runner trained on attention outputs."""
    cfg = runner_config(
        sae_config(architecture, **{"d_sae": N * SIZE, **NORMALIZED, **overrides}),
        output,
        hook_name=HOOK_Z,
        hook_head_index=hook_head_index,
        training_tokens=1_024,
    )
    with torch.enable_grad():
        make_runner(cfg, model).run()
    return SAE.load_from_disk(output)


@torch.no_grad()
@hooked_transformer_only
@both_architectures
def test_an_sae_trained_on_hook_z_reads_and_writes_all_heads(
    model: Any, tokens: torch.Tensor, tmp_path: Path, architecture: str
):
    sae: Any = trained_on_hook_z(
        architecture, model, tmp_path, reshape_activations="hook_z"
    )
    z = clean_activations(model, tokens, HOOK_Z)
    out, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    shown = hooks_of_sae(cache, HOOK_Z)
    assert shapes(shown) == {
        **shapes_inside(sae, *tokens.shape),
        "hook_sae_output": (*tokens.shape, 4, 8),
    }
    assert torch.equal(shown["hook_sae_input"], z.flatten(-2))
    assert torch.equal(sae.route(z).indices, shown["hook_expert_indices"])
    # The same SAE on heads that are already joined.
    joined = SAE.load_from_disk(tmp_path)
    joined.turn_off_forward_pass_hook_z_reshaping()
    want = joined(z.flatten(-2)).unflatten(-1, (4, 8))
    torch.testing.assert_close(shown["hook_sae_output"], want)
    torch.testing.assert_close(
        out, replaced_by(model, tokens, {HOOK_Z: lambda _: want})
    )
    clean = model(tokens)
    assert_differ(out, clean)
    for exclude in (False, True):
        with_error = model.run_with_saes(
            tokens, saes=[sae], use_error_term=True, exclude_special_tokens=exclude
        )
        torch.testing.assert_close(with_error, clean, atol=1e-5, rtol=0)


@torch.no_grad()
@hooked_transformer_only
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "topk"])
def test_an_sae_of_one_head_trains_on_it_and_is_spliced_into_every_head(
    model: Any, tokens: torch.Tensor, tmp_path: Path, architecture: str
):
    # SAELens ignores hook_head_index when it splices, whatever the architecture.
    sae = trained_on_hook_z(
        architecture, model, tmp_path, hook_head_index=2, d_in=8, d_sae=32, k=4
    )
    assert sae.cfg.metadata.hook_head_index == 2
    z = clean_activations(model, tokens, HOOK_Z)
    out, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    shown = cache[f"{HOOK_Z}.hook_sae_acts_post"]
    assert shown.shape == (*tokens.shape, 4, 32)
    torch.testing.assert_close(shown[:, :, 2], sae.encode(z[:, :, 2]))
    every_head = torch.stack([sae(z[:, :, head]) for head in range(4)], 2)
    torch.testing.assert_close(
        out, replaced_by(model, tokens, {HOOK_Z: lambda _: every_head})
    )

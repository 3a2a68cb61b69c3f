"""Spliced into a HookedSAETransformer, our SAEs do all that SAELens's own do."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import reconstruct, small_corpus
from sae_lens import (
    SAE,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TrainingSAE,
    TrainingSAEConfig,
)

from sae_lens_scale.saes.mixture.encoding import is_hooked

HOOK = "blocks.0.hook_resid_post"
LAST = "blocks.1.hook_resid_post"
POST = f"{HOOK}.hook_sae_acts_post"
PROMPTS = [
    "I love apples but hate oranges completely.",
    "def forward(self, x): return self.linear(x)",
    "Hello",
]
N, SIZE = 4, 16


def make_training_sae(
    architecture: str,
    model: HookedSAETransformer,
    hook: str = HOOK,
    **overrides: Any,
) -> TrainingSAE[Any]:
    """An SAE whose router and latents suit the model's activations at a hook."""
    torch.manual_seed(0)
    settings = {
        "architecture": architecture,
        "d_in": 32,
        "d_sae": N * SIZE,
        "num_experts": N,
        "k": 6,
        "decoder_init_norm": 1.0,
        "metadata": {"hook_name": hook},
    }
    cfg = TrainingSAEConfig.from_dict({**settings, **overrides})
    sae = TrainingSAE.from_dict(cfg.to_dict())
    _, cache = model.run_with_cache(PROMPTS, names_filter=hook)
    sae.initialize_from_activations(cache[hook].detach())  # type: ignore[operator]
    sae.b_enc.data.normal_(std=0.01)  # type: ignore[union-attr]
    sae.W_dec.data.mul_(torch.rand(N * SIZE, 1) + 0.5)
    if architecture == "scale":
        sae.omega.data.normal_(std=0.5)  # type: ignore[union-attr]
    return sae


def exported(sae: TrainingSAE[Any], folder: Path) -> SAE[Any]:
    sae.save_inference_model(folder)
    return SAE.load_from_disk(folder)


@pytest.fixture(
    scope="module",
    params=[
        (architecture, kind)
        for architecture in ("scale", "switch")
        for kind in ("inference", "training")
    ],
    ids="-".join,
)
def sae(
    request: pytest.FixtureRequest,
    tiny_model: HookedSAETransformer,
    tmp_path_factory: pytest.TempPathFactory,
) -> SAE[Any]:
    architecture, kind = request.param
    sae = make_training_sae(architecture, tiny_model)
    if kind == "training":
        return sae
    return exported(sae, tmp_path_factory.mktemp("sae"))


@pytest.fixture(scope="module")
def double_model(tiny_model: HookedSAETransformer) -> HookedSAETransformer:
    """The tiny model in float64, for finite differences."""
    cfg = copy.deepcopy(tiny_model.cfg)
    cfg.dtype = torch.float64
    return HookedSAETransformer(cfg, tiny_model.tokenizer).eval()


@pytest.fixture(autouse=True)
def nothing_stays_attached(
    tiny_model: HookedSAETransformer, double_model: HookedSAETransformer
) -> Any:
    yield
    for model in (tiny_model, double_model):
        attached = model.acts_to_saes
        hooks = [name for name, hook in model.hook_dict.items() if is_hooked(hook)]
        model.reset_saes()
        assert not attached and not hooks


def replaced_by(
    model: HookedSAETransformer,
    tokens: torch.Tensor,
    edits: dict[str, Callable[[torch.Tensor], torch.Tensor]],
    **kwargs: Any,
) -> torch.Tensor:
    """Logits with activations replaced by plain hooks, no SAE attached."""
    hooks: list[Any] = [
        (name, lambda x, hook, edit=edit: reconstruct(edit, x))
        for name, edit in edits.items()
    ]
    return model.run_with_hooks(tokens, fwd_hooks=hooks, **kwargs)


def clean_activations(
    model: HookedSAETransformer, tokens: torch.Tensor, hook: str = HOOK
) -> torch.Tensor:
    return model.run_with_cache(tokens, names_filter=hook)[1][hook]


def an_unselected_expert(indices: torch.Tensor) -> int:
    """An expert that the last token of the first prompt did not select."""
    return next(i for i in range(N) if i not in indices[0, -1].tolist())


def assert_differ(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() > 1e-3


@torch.no_grad()
def test_every_way_of_splicing_replaces_activations_with_reconstructions(
    sae: SAE[Any], tiny_model: HookedSAETransformer
):
    model = tiny_model
    tokens = model.to_tokens(PROMPTS)
    clean = model(tokens)
    want = replaced_by(model, tokens, {HOOK: sae})
    assert_differ(want, clean)
    assert torch.equal(model.run_with_saes(tokens, saes=[sae]), want)  # type: ignore[arg-type]
    # A single SAE, and text, will do too.
    assert torch.equal(model.run_with_saes(PROMPTS, saes=sae), want)  # type: ignore[arg-type]
    assert torch.equal(model.run_with_cache_with_saes(tokens, saes=[sae])[0], want)  # type: ignore[arg-type]
    seen: list[torch.Tensor] = []
    hooks: list[Any] = [(f"{HOOK}.hook_expert_indices", lambda x, hook: seen.append(x))]
    out = model.run_with_hooks_with_saes(tokens, saes=[sae], fwd_hooks=hooks)
    assert torch.equal(out, want)
    assert len(seen) == 1
    with model.saes(saes=[sae]):
        assert torch.equal(model(tokens), want)
    assert torch.equal(model(tokens), clean)
    model.add_sae(sae)
    assert torch.equal(model(tokens), want)
    model.reset_saes(HOOK)
    assert torch.equal(model(tokens), clean)
    loss = model.run_with_saes(tokens, saes=[sae], return_type="loss")
    torch.testing.assert_close(loss, model.loss_fn(want, tokens))


@torch.no_grad()
def test_cache_shows_all_hooks_of_a_batch_of_prompts(
    sae: SAE[Any], tiny_model: HookedSAETransformer
):
    tokens = tiny_model.to_tokens(PROMPTS)
    logits, cache = tiny_model.run_with_cache_with_saes(
        tokens, saes=[sae], use_error_term=True
    )
    x = clean_activations(tiny_model, tokens)
    b, s, e = *tokens.shape, sae.cfg.experts_per_token
    shown = {k[len(HOOK) + 1 :]: v for k, v in cache.items() if k.startswith(HOOK)}
    assert {name: tuple(tensor.shape) for name, tensor in shown.items()} == {
        "hook_sae_input": (b, s, 32),
        "hook_expert_weights": (b, s, e),
        "hook_expert_indices": (b, s, e),
        "hook_sae_acts_pre": (b, s, N * SIZE),
        "hook_sae_acts_post": (b, s, N * SIZE),
        "hook_sae_recons": (b, s, 32),
        "hook_sae_error": (b, s, 32),
        "hook_sae_output": (b, s, 32),
    }
    assert torch.equal(shown["hook_sae_input"], x)
    assert torch.equal(shown["hook_sae_acts_post"], sae.encode(x))
    assert torch.equal(shown["hook_sae_recons"], reconstruct(sae, x))
    assert torch.equal(shown["hook_sae_error"], x - reconstruct(sae, x))
    torch.testing.assert_close(shown["hook_sae_output"], x)
    # More than one expert is at work, or these tests would show little.
    assert shown["hook_expert_indices"].unique().numel() > 1

    _, only = tiny_model.run_with_cache_with_saes(
        tokens[:1], saes=[sae], names_filter=POST, remove_batch_dim=True
    )
    assert list(only) == [POST]
    torch.testing.assert_close(only[POST], shown["hook_sae_acts_post"][0])


@torch.no_grad()
def test_with_the_error_term_logits_are_the_clean_models(
    sae: SAE[Any], tiny_model: HookedSAETransformer
):
    clean = tiny_model(PROMPTS)
    out = tiny_model.run_with_saes(PROMPTS, saes=[sae], use_error_term=True)
    torch.testing.assert_close(out, clean, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["scale", "switch"])
@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
def test_run_time_normalization_survives_the_error_term(
    tiny_model: HookedSAETransformer, architecture: str, normalization: str
):
    sae = make_training_sae(
        architecture,
        tiny_model,
        normalize_activations=normalization,
        aux_loss_coefficient=0.0,
    )
    tokens = tiny_model.to_tokens(PROMPTS)
    want = replaced_by(tiny_model, tokens, {HOOK: sae})
    assert torch.equal(tiny_model.run_with_saes(tokens, saes=[sae]), want)  # type: ignore[arg-type]
    out = tiny_model.run_with_saes(tokens, saes=[sae], use_error_term=True)
    torch.testing.assert_close(out, tiny_model(tokens), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("use_error_term", [False, True])
def test_steering_a_latent_of_an_unselected_expert_moves_the_logits_by_its_decoder_row(
    sae: SAE[Any], tiny_model: HookedSAETransformer, use_error_term: bool
):
    model = tiny_model
    tokens = model.to_tokens(PROMPTS)
    x = clean_activations(model, tokens)
    latent = an_unselected_expert(sae.route(x).indices) * SIZE + 3  # type: ignore[operator]
    direction = sae.W_dec[latent]
    if sae.cfg.rescale_acts_by_decoder_norm:
        direction = direction / direction.norm()

    def steer(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        assert (acts[0, -1, latent] == 0).all()
        acts[..., latent] += 0.1
        return acts

    with model.saes(saes=[sae], use_error_term=use_error_term):
        plain = model(tokens)
        steered = model.run_with_hooks(tokens, fwd_hooks=[(POST, steer)])
    base = x if use_error_term else sae(x)
    want = replaced_by(model, tokens, {HOOK: lambda _: base + 0.1 * direction})
    torch.testing.assert_close(steered, want, atol=1e-4, rtol=0)
    assert_differ(steered[0, -1], plain[0, -1])


@torch.no_grad()
@pytest.mark.parametrize("topk_over", ["activations", "gated_activations"])
def test_ablating_an_expert_through_its_weight_takes_its_latents_out_of_the_model(
    topk_over: str,
    sae: SAE[Any],
    tiny_model: HookedSAETransformer,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(sae.cfg, "topk_over", topk_over)
    tokens = tiny_model.to_tokens(PROMPTS)
    routing = sae.route(clean_activations(tiny_model, tokens))  # type: ignore[operator]
    expert = int(routing.indices[0, -1, 0])

    def ablate(weights: torch.Tensor, hook: Any) -> torch.Tensor:
        return weights.masked_fill(routing.indices == expert, 0.0)

    def zero_its_latents(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        acts[..., expert * SIZE : (expert + 1) * SIZE] = 0
        return acts

    def run(name: str, edit: Any) -> torch.Tensor:
        return tiny_model.run_with_hooks_with_saes(
            tokens, saes=[sae], fwd_hooks=[(f"{HOOK}.{name}", edit)]
        )

    ablated = run("hook_expert_weights", ablate)
    without = run("hook_sae_acts_post", zero_its_latents)
    # Ranked after the gate, latents of a token's other experts take their places.
    others = topk_over == "gated_activations" and routing.indices.shape[-1] > 1
    assert torch.equal(ablated, without) == (not others)
    assert_differ(ablated, run("hook_sae_acts_post", lambda acts, hook: acts))
    with sae.hooks([("hook_expert_weights", ablate)]):
        acts = sae.encode(clean_activations(tiny_model, tokens))
    assert acts.any()
    assert not acts[..., expert * SIZE : (expert + 1) * SIZE].any()


@torch.no_grad()
def test_forcing_an_expert_through_its_index_makes_the_model_use_it(
    sae: SAE[Any], tiny_model: HookedSAETransformer
):
    model = tiny_model
    tokens = model.to_tokens(PROMPTS)
    x = clean_activations(model, tokens)
    forced = an_unselected_expert(sae.route(x).indices)  # type: ignore[operator]

    def force(indices: torch.Tensor, hook: Any) -> torch.Tensor:
        others = [i for i in range(N) if i != forced]
        indices = indices.clone()
        indices[..., 0] = forced
        indices[..., 1:] = torch.tensor(others[: indices.shape[-1] - 1])
        return indices

    with model.saes(saes=[sae]):
        plain = model(tokens)
        hooks: list[Any] = [(f"{HOOK}.hook_expert_indices", force)]
        with model.hooks(fwd_hooks=hooks):
            _, cache = model.run_with_cache(tokens)
            logits = model(tokens)
    assert (cache[f"{HOOK}.hook_expert_indices"][..., 0] == forced).all()
    by_expert = cache[POST].unflatten(-1, (N, SIZE))
    assert (by_expert[..., forced, :] > 0).any()
    if sae.cfg.experts_per_token == 1:
        assert by_expert.count_nonzero() == by_expert[..., forced, :].count_nonzero()
    recons = sae.run_with_hooks(x, fwd_hooks=[(hooks[0][0].split(".")[-1], force)])
    want = replaced_by(model, tokens, {HOOK: lambda _: recons})
    torch.testing.assert_close(logits, want)
    assert_differ(logits, plain)


@pytest.mark.parametrize("architecture", ["scale", "switch"])
@pytest.mark.parametrize("use_error_term", [False, True])
def test_attribution_to_latents_matches_finite_differences(
    double_model: HookedSAETransformer, architecture: str, use_error_term: bool
):
    model = double_model
    sae = make_training_sae(architecture, model, dtype="float64")
    tokens = model.to_tokens(PROMPTS)
    with model.saes(saes=[sae], use_error_term=use_error_term):
        _, cache = model.run_with_cache(tokens, incl_bwd=True, return_type="loss")

        @torch.no_grad()
        def loss(where: tuple[int, int, int], step: float) -> torch.Tensor:
            def shift(acts: torch.Tensor, hook: Any) -> torch.Tensor:
                acts[where] += step
                return acts

            return model.run_with_hooks(
                tokens, return_type="loss", fwd_hooks=[(POST, shift)]
            )

        acts, grads = cache[POST], cache[f"{POST}_grad"]
        unselected = an_unselected_expert(cache[f"{HOOK}.hook_expert_indices"])
        latents = [int(acts[0, 4].argmax()), unselected * SIZE + 3]
        for latent in latents:
            where = (0, 4, latent)
            slope = (loss(where, 1e-4) - loss(where, -1e-4)) / 2e-4
            assert slope.abs() > 1e-5
            torch.testing.assert_close(grads[where], slope, atol=1e-9, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["scale", "switch"])
def test_gradients_flow_through_encoder_router_and_gates_to_the_embedding(
    double_model: HookedSAETransformer, architecture: str
):
    model = double_model
    sae = make_training_sae(architecture, model, dtype="float64", gate="softmax")
    tokens = model.to_tokens(PROMPTS)
    direction = torch.randn(
        *tokens.shape,
        32,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
    )
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
@pytest.mark.parametrize("use_error_term", [False, True])
def test_saes_of_several_architectures_share_a_model(
    tiny_model: HookedSAETransformer, tmp_path: Path, use_error_term: bool
):
    model = tiny_model
    tokens = model.to_tokens(PROMPTS)
    clean = model(tokens)
    topk = TrainingSAE.from_dict(
        {"architecture": "topk", "d_in": 32, "d_sae": 64, "k": 8, "metadata": {}}
    )
    topk.cfg.metadata.hook_name = LAST
    saes = [
        exported(make_training_sae("scale", model), tmp_path / "scale"),
        exported(
            make_training_sae("switch", model, "blocks.1.hook_mlp_out"),
            tmp_path / "switch",
        ),
        exported(topk, tmp_path / "topk"),
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
    assert torch.equal(out, want)  # type: ignore[arg-type]
    with_topk_only = replaced_by(model, tokens, {LAST: saes[2]})
    for sae in saes:
        model.add_sae(sae)
    model.reset_saes(hooks[:2])
    assert torch.equal(model(tokens), with_topk_only)
    model.reset_saes()
    assert torch.equal(model(tokens), clean)


@torch.no_grad()
def test_at_one_hook_the_last_sae_wins_and_the_attached_one_comes_back(
    tiny_model: HookedSAETransformer,
):
    model = tiny_model
    tokens = model.to_tokens(PROMPTS)
    scale = make_training_sae("scale", model)
    switch = make_training_sae("switch", model)
    clean = model(tokens)
    with_scale = replaced_by(model, tokens, {HOOK: scale})
    with_switch = replaced_by(model, tokens, {HOOK: switch})
    assert_differ(with_scale, with_switch)
    assert torch.equal(model.run_with_saes(tokens, saes=[switch, scale]), with_scale)  # type: ignore[arg-type]
    model.add_sae(scale, use_error_term=True)
    assert torch.equal(model.run_with_saes(tokens, saes=[switch]), with_switch)  # type: ignore[arg-type]
    assert model.acts_to_saes == {HOOK: scale}
    torch.testing.assert_close(model(tokens), clean, atol=1e-5, rtol=0)
    model.reset_saes()


@torch.no_grad()
@pytest.mark.parametrize("use_error_term", [False, True])
def test_special_tokens_and_chosen_tokens_bypass_the_sae(
    sae: SAE[Any], tiny_model: HookedSAETransformer, use_error_term: bool
):
    model = tiny_model
    tokens = model.to_tokens(PROMPTS[:2], padding_side="left")
    bos, pad = model.tokenizer.bos_token_id, model.tokenizer.pad_token_id  # type: ignore[union-attr]
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
        torch.testing.assert_close(cache[f"{HOOK}.hook_sae_output"], want)
        if use_error_term:
            error = cache[f"{HOOK}.hook_sae_error"]
            assert not error[bypassed].any()
            assert error[~bypassed].any(-1).all()
        torch.testing.assert_close(
            out, replaced_by(model, tokens, {HOOK: lambda _, want=want: want})
        )


@torch.no_grad()
def test_left_padded_prompts_give_what_each_prompt_gives_alone(
    sae: SAE[Any], tiny_model: HookedSAETransformer
):
    batch = tiny_model.run_with_saes(PROMPTS, saes=[sae], padding_side="left")
    for logits, prompt in zip(batch, PROMPTS, strict=True):  # type: ignore[arg-type]
        alone = tiny_model.run_with_saes(prompt, saes=[sae])
        torch.testing.assert_close(logits[-1], alone[0, -1], atol=1e-4, rtol=0)  # type: ignore[index]


@torch.no_grad()
def test_splicing_works_when_the_model_starts_or_stops_at_a_layer(
    sae: SAE[Any], tiny_model: HookedSAETransformer
):
    model = tiny_model
    tokens = model.to_tokens(PROMPTS)
    residual = model.run_with_saes(tokens, saes=[sae], stop_at_layer=1)
    clean = clean_activations(model, tokens)
    assert torch.equal(residual, reconstruct(sae, clean))  # type: ignore[arg-type]
    # Layer 0 and its SAE are left out.
    after = model.run_with_saes(residual, saes=[sae], start_at_layer=1)
    assert torch.equal(after, model.run_with_saes(tokens, saes=[sae]))  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["scale", "switch"])
@pytest.mark.parametrize(
    ("model_dtype", "sae_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_dtypes_of_model_and_sae_may_differ(
    tiny_model: HookedSAETransformer,
    architecture: str,
    model_dtype: str,
    sae_dtype: str,
):
    sae = make_training_sae(architecture, tiny_model, dtype=sae_dtype)
    cfg = copy.deepcopy(tiny_model.cfg)
    cfg.dtype = getattr(torch, model_dtype)
    model = HookedSAETransformer(cfg, tiny_model.tokenizer).eval()
    tokens = model.to_tokens(PROMPTS)
    clean = model(tokens)
    out, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    assert out.dtype == clean.dtype == cfg.dtype  # type: ignore[union-attr]
    assert cache[POST].dtype == sae.dtype
    assert cache[f"{HOOK}.hook_expert_indices"].dtype == torch.int64
    assert torch.equal(out, replaced_by(model, tokens, {HOOK: sae}))  # type: ignore[arg-type]
    assert_differ(out, clean)  # type: ignore[arg-type]
    # What is left is rounding in bfloat16.
    with_error = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
    assert (with_error - clean).norm() < 0.05 * (out - clean).norm()  # type: ignore[operator]


@torch.no_grad()
def test_a_spliced_model_generates_alike_with_and_without_a_cache_of_keys(
    sae: SAE[Any], tiny_model: HookedSAETransformer
):
    tokens = tiny_model.to_tokens(PROMPTS[0])
    with tiny_model.saes(saes=[sae]):
        with_cache, without = (
            tiny_model.generate(
                tokens,
                max_new_tokens=4,
                do_sample=False,
                stop_at_eos=False,
                use_past_kv_cache=use_past_kv_cache,
                verbose=False,
            )
            for use_past_kv_cache in (True, False)
        )
        greedy = tiny_model(without[:, :-1])[:, -4:].argmax(-1)  # type: ignore[index]
    assert torch.equal(with_cache, without)  # type: ignore[arg-type]
    assert torch.equal(without[:, -4:], greedy)  # type: ignore[index]


def train(
    architecture: str, model: HookedSAETransformer, output: Path, **overrides: Any
) -> SAE[Any]:
    """Train on attention outputs with SAELens's runner and load what it exports."""
    sae: dict[str, Any] = {
        "architecture": architecture,
        "d_in": 32,
        "d_sae": N * SIZE,
        "num_experts": N,
        "k": 6,
        "normalize_activations": "expected_average_only_in",
    }
    sae |= overrides.pop("sae", {})
    cfg = LanguageModelSAERunnerConfig(
        sae=TrainingSAEConfig.from_dict(sae),
        model_name="tiny",
        hook_name="blocks.0.attn.hook_z",
        is_dataset_tokenized=False,
        context_size=16,
        training_tokens=1_024,
        train_batch_size_tokens=128,
        store_batch_size_prompts=8,
        n_batches_in_buffer=8,
        n_batches_for_norm_estimate=2,
        lr=1e-3,
        seed=0,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(output),
        verbose=False,
        **overrides,
    )
    torch.manual_seed(0)
    LanguageModelSAETrainingRunner(
        cfg, override_dataset=small_corpus(), override_model=model
    ).run()
    return SAE.load_from_disk(output)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["scale", "switch"])
def test_an_sae_trained_on_hook_z_reads_and_writes_all_heads(
    tiny_model: HookedSAETransformer, tmp_path: Path, architecture: str
):
    with torch.enable_grad():
        sae = train(
            architecture, tiny_model, tmp_path, sae={"reshape_activations": "hook_z"}
        )
    hook = "blocks.0.attn.hook_z"
    tokens = tiny_model.to_tokens(PROMPTS)
    z = clean_activations(tiny_model, tokens, hook)
    b, s, e = *tokens.shape, sae.cfg.experts_per_token  # type: ignore[attr-defined]
    out, cache = tiny_model.run_with_cache_with_saes(tokens, saes=[sae])
    shown = {k[len(hook) + 1 :]: v for k, v in cache.items() if k.startswith(hook)}
    assert {name: tuple(tensor.shape) for name, tensor in shown.items()} == {
        "hook_sae_input": (b, s, 32),
        "hook_expert_weights": (b, s, e),
        "hook_expert_indices": (b, s, e),
        "hook_sae_acts_pre": (b, s, N * SIZE),
        "hook_sae_acts_post": (b, s, N * SIZE),
        "hook_sae_recons": (b, s, 32),
        "hook_sae_output": (b, s, 4, 8),
    }
    assert torch.equal(shown["hook_sae_input"], z.flatten(-2))
    assert torch.equal(sae.route(z).indices, shown["hook_expert_indices"])  # type: ignore[operator]
    # The same SAE on heads that are already joined.
    joined = SAE.load_from_disk(tmp_path)
    joined.turn_off_forward_pass_hook_z_reshaping()
    want = joined(z.flatten(-2)).unflatten(-1, (4, 8))
    torch.testing.assert_close(shown["hook_sae_output"], want)
    torch.testing.assert_close(
        out, replaced_by(tiny_model, tokens, {hook: lambda _: want})
    )
    clean = tiny_model(tokens)
    assert_differ(out, clean)  # type: ignore[arg-type]
    for exclude in (False, True):
        with_error = tiny_model.run_with_saes(
            tokens, saes=[sae], use_error_term=True, exclude_special_tokens=exclude
        )
        torch.testing.assert_close(with_error, clean, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["scale", "switch", "topk"])
def test_an_sae_of_one_head_trains_on_it_and_is_spliced_into_every_head(
    tiny_model: HookedSAETransformer, tmp_path: Path, architecture: str
):
    # SAELens ignores hook_head_index when it splices, whatever the architecture.
    sizes = {"d_in": 8, "d_sae": 32, "k": 4}
    with torch.enable_grad():
        sae = train(architecture, tiny_model, tmp_path, sae=sizes, hook_head_index=2)
    assert sae.cfg.metadata.hook_head_index == 2
    tokens = tiny_model.to_tokens(PROMPTS)
    z = clean_activations(tiny_model, tokens, "blocks.0.attn.hook_z")
    hook = "blocks.0.attn.hook_z"
    out, cache = tiny_model.run_with_cache_with_saes(tokens, saes=[sae])
    shown = cache[f"{hook}.hook_sae_acts_post"]
    assert shown.shape == (*tokens.shape, 4, 32)
    torch.testing.assert_close(shown[:, :, 2], sae.encode(z[:, :, 2]))
    every_head = torch.stack([sae(z[:, :, head]) for head in range(4)], 2)
    torch.testing.assert_close(
        out, replaced_by(tiny_model, tokens, {hook: lambda _: every_head})
    )

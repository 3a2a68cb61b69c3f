"""Our SAEs on transformer-lens 3's bridge, and what SAELens still gets wrong there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import reconstruct, small_corpus
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TrainingSAE,
    TrainingSAEConfig,
)
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

pytest.importorskip("transformer_lens.model_bridge")
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

HOOK = "blocks.0.hook_out"
POST = f"{HOOK}.hook_sae_acts_post"
PROMPT = "I love apples but hate oranges completely, I said."
N, SIZE = 4, 16
DOCS = Path(__file__).parents[2] / "docs/upstream/saetransformerbridge.md"


def boot(folder: Path, **kwargs: Any) -> SAETransformerBridge:
    return SAETransformerBridge.boot_transformers(str(folder), **kwargs)


@pytest.fixture(scope="module")
def booted(tiny_llama: Path) -> SAETransformerBridge:
    return boot(tiny_llama)


@pytest.fixture
def bridge(booted: SAETransformerBridge) -> Iterator[SAETransformerBridge]:
    yield booted
    attached = booted.acts_to_saes
    booted.reset_saes()
    # The workaround that the report upstream describes.
    for name, hook in booted.hook_dict.items():
        hook.name = name
    assert not attached


@pytest.fixture(params=["scale", "switch"])
def sae(request: pytest.FixtureRequest, bridge: SAETransformerBridge) -> SAE[Any]:
    return make_sae(request.param, bridge)


def make_sae(
    architecture: str,
    bridge: SAETransformerBridge,
    hook: str = HOOK,
    name: str | None = None,
    **overrides: Any,
) -> TrainingSAE[Any]:
    """An SAE that suits the activations at a hook, under that or another name."""
    torch.manual_seed(0)
    settings = {
        "architecture": architecture,
        "d_in": 32,
        "d_sae": N * SIZE,
        "num_experts": N,
        "k": 6,
        "decoder_init_norm": 1.0,
        "metadata": {
            "hook_name": name or hook,
            "context_size": 16,
            "prepend_bos": True,
        },
    }
    cfg = TrainingSAEConfig.from_dict({**settings, **overrides})
    sae = TrainingSAE.from_dict(cfg.to_dict())
    x = clean_activations(bridge, hook).flatten(2)
    sae.initialize_from_activations(x)  # type: ignore[operator]
    return sae


@torch.no_grad()
def clean_activations(bridge: SAETransformerBridge, hook: str = HOOK) -> torch.Tensor:
    return bridge.run_with_cache(PROMPT, names_filter=[hook])[1][hook]


def replaced_by(bridge: SAETransformerBridge, edits: dict[str, Any]) -> torch.Tensor:
    """Logits with activations replaced by plain hooks, no SAE attached."""
    hooks: list[Any] = [
        (name, lambda x, hook, edit=edit: reconstruct(edit, x))
        for name, edit in edits.items()
    ]
    return bridge.run_with_hooks(PROMPT, fwd_hooks=hooks)


def assert_differ(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).norm() > 0.01 * b.norm()


@torch.no_grad()
def test_every_way_of_splicing_replaces_activations_with_reconstructions(
    sae: SAE[Any], bridge: SAETransformerBridge
):
    clean = bridge(PROMPT)
    want = replaced_by(bridge, {HOOK: sae})
    assert_differ(want, clean)
    assert torch.equal(bridge.run_with_saes(PROMPT, saes=[sae]), want)  # type: ignore[arg-type]
    assert torch.equal(bridge.run_with_cache_with_saes(PROMPT, saes=[sae])[0], want)  # type: ignore[arg-type]
    seen: list[torch.Tensor] = []
    hooks: list[Any] = [(f"{HOOK}.hook_expert_indices", lambda x, hook: seen.append(x))]
    out = bridge.run_with_hooks_with_saes(PROMPT, saes=[sae], fwd_hooks=hooks)
    assert torch.equal(out, want)
    assert len(seen) == 1
    with bridge.saes(saes=[sae]):
        assert torch.equal(bridge(PROMPT), want)
    assert torch.equal(bridge(PROMPT), clean)
    bridge.add_sae(sae)
    assert torch.equal(bridge(PROMPT), want)
    bridge.reset_saes(HOOK)
    assert torch.equal(bridge(PROMPT), clean)


@torch.no_grad()
@pytest.mark.parametrize("name", [HOOK, "blocks.0.hook_resid_post"])
@pytest.mark.parametrize("architecture", ["scale", "switch"])
def test_cache_shows_all_hooks_under_the_canonical_name(
    bridge: SAETransformerBridge, architecture: str, name: str
):
    sae = make_sae(architecture, bridge, name=name)
    assert bridge.get_sae_hook_name(sae) == POST
    logits, cache = bridge.run_with_cache_with_saes(
        PROMPT, saes=[sae], use_error_term=True
    )
    x = clean_activations(bridge)
    shown = {k[len(HOOK) + 1 :]: v for k, v in cache.items() if k.startswith(HOOK)}
    s, e = x.shape[1], sae.cfg.experts_per_token
    assert {name: tuple(tensor.shape) for name, tensor in shown.items()} == {
        "hook_sae_input": (1, s, 32),
        "hook_expert_weights": (1, s, e),
        "hook_expert_indices": (1, s, e),
        "hook_sae_acts_pre": (1, s, N * SIZE),
        "hook_sae_acts_post": (1, s, N * SIZE),
        "hook_sae_recons": (1, s, 32),
        "hook_sae_error": (1, s, 32),
        "hook_sae_output": (1, s, 32),
    }
    assert torch.equal(shown["hook_sae_acts_post"], sae.encode(x))
    assert torch.equal(shown["hook_expert_indices"], sae.route(x).indices)  # type: ignore[operator]
    assert torch.equal(shown["hook_sae_error"], x - reconstruct(sae, x))
    assert shown["hook_expert_indices"].unique().numel() > 1
    torch.testing.assert_close(logits, bridge(PROMPT), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("use_error_term", [False, True])
def test_steering_a_latent_of_an_unselected_expert_moves_the_logits(
    sae: SAE[Any], bridge: SAETransformerBridge, use_error_term: bool
):
    x = clean_activations(bridge)
    chosen = sae.route(x).indices[0, -1].tolist()  # type: ignore[operator]
    latent = next(i for i in range(N) if i not in chosen) * SIZE + 3
    base = x if use_error_term else sae(x)
    direction = sae.W_dec[latent] / sae.W_dec[latent].norm()
    plain = replaced_by(bridge, {HOOK: lambda _: base})
    want = replaced_by(bridge, {HOOK: lambda _: base + 0.1 * direction})

    def steer(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        assert (acts[0, -1, latent] == 0).all()
        acts[..., latent] += 0.1
        return acts

    with bridge.saes(saes=[sae], use_error_term=use_error_term):
        steered = bridge.run_with_hooks(PROMPT, fwd_hooks=[(POST, steer)])
    torch.testing.assert_close(steered, want, atol=1e-4, rtol=0)
    assert_differ(steered[0, -1], plain[0, -1])


@torch.no_grad()
def test_experts_can_be_ablated_and_forced(sae: SAE[Any], bridge: SAETransformerBridge):
    x = clean_activations(bridge)
    indices = sae.route(x).indices  # type: ignore[operator]
    expert = int(indices[0, -1, 0])
    edits: dict[str, Any] = {
        "hook_expert_weights": lambda w, hook: w.masked_fill(indices == expert, 0.0),
        "hook_expert_indices": lambda i, hook: (i + 1) % N,
    }
    for name, edit in edits.items():
        recons = sae.run_with_hooks(x, fwd_hooks=[(name, edit)])
        assert_differ(recons, sae(x))
        want = replaced_by(bridge, {HOOK: lambda _, recons=recons: recons})
        out = bridge.run_with_hooks_with_saes(
            PROMPT, saes=[sae], fwd_hooks=[(f"{HOOK}.{name}", edit)]
        )
        bridge.hook_dict[HOOK].name = HOOK
        torch.testing.assert_close(out, want)


@torch.no_grad()
@pytest.mark.parametrize("use_error_term", [False, True])
def test_saes_of_several_architectures_share_a_bridge(
    bridge: SAETransformerBridge, use_error_term: bool
):
    clean = bridge(PROMPT)
    topk = TrainingSAE.from_dict(
        {"architecture": "topk", "d_in": 32, "d_sae": 64, "k": 8, "metadata": {}}
    )
    topk.cfg.metadata.hook_name = "blocks.1.hook_out"
    saes = {
        HOOK: make_sae("scale", bridge),
        "blocks.1.mlp.hook_out": make_sae("switch", bridge, "blocks.1.mlp.hook_out"),
        "blocks.1.hook_out": topk,
    }
    want = clean if use_error_term else replaced_by(bridge, saes)
    out = bridge.run_with_saes(
        PROMPT, saes=list(saes.values()), use_error_term=use_error_term
    )
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(bridge(PROMPT), clean)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["scale", "switch"])
def test_an_sae_on_hook_z_reads_heads_that_the_bridge_has_joined(
    tiny_llama: Path, tmp_path: Path, architecture: str
):
    # Anew, because a hook that an SAE was detached from does not separate heads.
    bridge = boot(tiny_llama)
    canonical, alias = "blocks.0.attn.o.hook_in", "blocks.0.attn.hook_z"
    trained = make_sae(
        architecture, bridge, canonical, name=alias, reshape_activations="hook_z"
    )
    trained.save_inference_model(tmp_path)
    sae = SAE.load_from_disk(tmp_path)
    # Hooks see separate heads; what replaces a hook point does not.
    z = clean_activations(bridge, canonical)
    assert z.shape[2:] == (4, 8)
    want = replaced_by(bridge, {canonical: sae})
    out, cache = bridge.run_with_cache_with_saes(PROMPT, saes=[sae])
    torch.testing.assert_close(out, want)
    assert torch.equal(cache[f"{canonical}.hook_sae_acts_post"], sae.encode(z))
    # Off the bridge it reads separate heads, as before.
    torch.testing.assert_close(sae(z).flatten(-2), trained(z.flatten(-2)))


@torch.no_grad()
def test_bridge_and_sae_may_both_be_in_bfloat16(tiny_llama: Path):
    bridge = boot(tiny_llama, dtype=torch.bfloat16)
    clean = bridge(PROMPT)
    for architecture in ("scale", "switch"):
        sae = make_sae(architecture, bridge, dtype="bfloat16")
        out = bridge.run_with_saes(PROMPT, saes=[sae])
        assert out.dtype == clean.dtype == torch.bfloat16  # type: ignore[union-attr]
        with_error = bridge.run_with_saes(PROMPT, saes=[sae], use_error_term=True)
        assert (with_error - clean).norm() < 0.05 * (out - clean).norm()  # type: ignore[operator]


def test_gradients_reach_activations_inside_the_sae_and_before_it(
    sae: SAE[Any], bridge: SAETransformerBridge
):
    with bridge.saes(saes=[sae]):
        _, cache = bridge.run_with_cache(PROMPT, incl_bwd=True, return_type="loss")
    assert (cache[f"{POST}_grad"] != 0).all(-1).any()
    assert cache["embed.hook_out_grad"].any()
    bridge.zero_grad(set_to_none=True)


@pytest.mark.parametrize("architecture", ["scale", "switch"])
def test_the_runner_trains_on_a_bridge_and_evaluation_takes_the_export(
    bridge: SAETransformerBridge, tmp_path: Path, architecture: str
):
    cfg = LanguageModelSAERunnerConfig(
        sae=TrainingSAEConfig.from_dict(
            {
                "architecture": architecture,
                "d_in": 32,
                "d_sae": N * SIZE,
                "num_experts": N,
                "k": 6,
                "normalize_activations": "expected_average_only_in",
            }
        ),
        model_name="tiny",
        hook_name=HOOK,
        is_dataset_tokenized=False,
        context_size=16,
        training_tokens=4_096,
        train_batch_size_tokens=128,
        store_batch_size_prompts=8,
        n_batches_in_buffer=8,
        n_batches_for_norm_estimate=4,
        lr=3e-3,
        seed=0,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(tmp_path),
        verbose=False,
    )
    torch.manual_seed(0)
    model: Any = bridge  # SAELens's annotations do not know it
    trained = LanguageModelSAETrainingRunner(
        cfg, override_dataset=small_corpus(), override_model=model
    ).run()
    sae = SAE.load_from_disk(tmp_path)
    assert sae.cfg.metadata.hook_name == HOOK
    x = clean_activations(bridge)
    torch.testing.assert_close(sae.encode(x), trained.encode(x))
    store = ActivationsStore.from_sae(
        model, sae, small_corpus(), store_batch_size_prompts=4
    )
    metrics, features = run_evals(
        sae, store, model, ActivationScaler(), get_eval_everything_config(4, 2, 2)
    )
    assert 0.05 < metrics["reconstruction_quality"]["explained_variance"] < 1
    assert 0 < metrics["sparsity"]["l0"] <= 6
    behaviour = metrics["model_performance_preservation"]
    # The hooks really were called.
    assert behaviour["ce_loss_without_sae"] != behaviour["ce_loss_with_ablation"]
    assert behaviour["ce_loss_without_sae"] != behaviour["ce_loss_with_sae"]
    assert len(features["feature_density"]) == N * SIZE


def test_what_the_upstream_report_says_is_still_so(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
):
    text = DOCS.read_text()
    namespace: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```.*?```text\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    for code, printed in blocks:
        exec(code.replace('"gpt2"', repr(str(tiny_llama))), namespace)
        assert capsys.readouterr().out == printed

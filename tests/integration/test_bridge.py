"""SAETransformerBridge: names, heads, gradients, training, and defects of SAELens there."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_corpus
from integration.runs import (
    NORMALIZED,
    both_architectures,
    exported,
    make_runner,
    runner_config,
    sae_config,
)
from integration.splicing import (
    PROMPTS,
    SIZE,
    N,
    clean_activations,
    hooks_of_sae,
    replaced_by,
    restore_hook_names,
    suited_sae,
)
from sae_lens import SAE
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

pytest.importorskip("transformer_lens.model_bridge")
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

HOOK = "blocks.0.hook_out"
REPORT = Path(__file__).parents[2] / "docs/upstream/saetransformerbridge.md"


@pytest.fixture(scope="module")
def booted(tiny_llama: Path) -> SAETransformerBridge:
    return SAETransformerBridge.boot_transformers(str(tiny_llama))


@pytest.fixture
def bridge(booted: SAETransformerBridge) -> Iterator[Any]:
    yield booted
    attached = booted.acts_to_saes
    booted.reset_saes()
    restore_hook_names(booted)
    assert not attached


@torch.no_grad()
@both_architectures
def test_an_sae_under_an_alias_of_its_hook_is_cached_under_the_canonical_name(
    bridge: Any, architecture: str
):
    sae = suited_sae(architecture, bridge, HOOK, name="blocks.0.hook_resid_post")
    assert bridge.get_sae_hook_name(sae) == f"{HOOK}.hook_sae_acts_post"
    logits, cache = bridge.run_with_cache_with_saes(PROMPTS, saes=[sae])
    shown = hooks_of_sae(cache, HOOK)
    sae.cfg.metadata.hook_name = HOOK
    want_logits, want_cache = bridge.run_with_cache_with_saes(PROMPTS, saes=[sae])
    want = hooks_of_sae(want_cache, HOOK)
    assert torch.equal(logits, want_logits)
    assert want
    torch.testing.assert_close(shown, want, atol=0, rtol=0)


@torch.no_grad()
@both_architectures
def test_an_sae_on_hook_z_reads_heads_that_the_bridge_has_joined(
    tiny_llama: Path, tmp_path: Path, architecture: str
):
    # Anew, because a hook that an SAE was detached from does not separate heads.
    bridge: Any = SAETransformerBridge.boot_transformers(str(tiny_llama))
    canonical, alias = "blocks.0.attn.o.hook_in", "blocks.0.attn.hook_z"
    trained = suited_sae(
        architecture, bridge, canonical, name=alias, reshape_activations="hook_z"
    )
    sae = exported(trained, tmp_path)
    # Hooks see separate heads; what replaces a hook point does not.
    z = clean_activations(bridge, PROMPTS, canonical)
    assert z.shape[2:] == (4, 8)
    want = replaced_by(bridge, bridge.to_tokens(PROMPTS), {canonical: sae})
    out, cache = bridge.run_with_cache_with_saes(PROMPTS, saes=[sae])
    torch.testing.assert_close(out, want)
    assert torch.equal(cache[f"{canonical}.hook_sae_acts_post"], sae.encode(z))
    # Off the bridge it reads separate heads, as before.
    torch.testing.assert_close(sae(z).flatten(-2), trained(z.flatten(-2)))


@both_architectures
def test_gradients_reach_activations_inside_the_sae_and_before_it(
    bridge: Any, architecture: str
):
    sae = suited_sae(architecture, bridge)
    with bridge.saes(saes=[sae]):
        _, cache = bridge.run_with_cache(PROMPTS, incl_bwd=True, return_type="loss")
    assert (cache[f"{HOOK}.hook_sae_acts_post_grad"] != 0).all(-1).any()
    assert cache["embed.hook_out_grad"].any()
    bridge.zero_grad(set_to_none=True)


@both_architectures
def test_the_runner_trains_on_a_bridge_and_evaluation_takes_the_export(
    bridge: Any, tmp_path: Path, architecture: str
):
    cfg = runner_config(
        sae_config(architecture, d_sae=N * SIZE, **NORMALIZED),
        tmp_path,
        hook_name=HOOK,
        context_size=16,
        training_tokens=4_096,
        train_batch_size_tokens=128,
    )
    trained = make_runner(cfg, bridge).run()
    sae = SAE.load_from_disk(tmp_path)
    assert sae.cfg.metadata.hook_name == HOOK
    x = clean_activations(bridge, PROMPTS)
    torch.testing.assert_close(sae.encode(x), trained.encode(x))
    store = ActivationsStore.from_sae(
        bridge, sae, small_corpus(), store_batch_size_prompts=4
    )
    metrics, features = run_evals(
        sae, store, bridge, ActivationScaler(), get_eval_everything_config(4, 2, 2)
    )
    assert 0.05 < metrics["reconstruction_quality"]["explained_variance"] < 1
    assert 0 < metrics["sparsity"]["l0"] <= 6
    behaviour = metrics["model_performance_preservation"]
    # The hooks really were called.
    assert behaviour["ce_loss_without_sae"] != behaviour["ce_loss_with_ablation"]
    assert behaviour["ce_loss_without_sae"] != behaviour["ce_loss_with_sae"]
    assert len(features["feature_density"]) == N * SIZE


def test_the_upstream_report_still_prints_the_same(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
):
    namespace: dict[str, Any] = {}
    blocks = re.findall(
        r"```python\n(.*?)```.*?```text\n(.*?)```", REPORT.read_text(), re.DOTALL
    )
    assert len(blocks) == 3
    for code, printed in blocks:
        exec(code.replace('"gpt2"', repr(str(tiny_llama))), namespace)
        assert capsys.readouterr().out == printed

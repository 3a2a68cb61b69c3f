"""The whole way on a real language model, with SAELens's own runner and evaluation."""

import json
import math
from typing import Any, NamedTuple

import pytest
import torch
from helpers import small_corpus
from integration.runs import (
    ARCHITECTURES,
    NORMALIZED,
    make_runner,
    runner_config,
    sae_config,
)
from sae_lens import HookedSAETransformer, LanguageModelSAERunnerConfig
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

HOOK = "blocks.8.hook_resid_post"
SENTENCE = "I love apples but hate oranges completely."


class Run(NamedTuple):
    """Config of a finished run, the SAE that it returned, and the one that it exported."""

    cfg: LanguageModelSAERunnerConfig[Any]
    trained: TrainingSAE[Any]
    exported: SAE[Any]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def run(
    request: pytest.FixtureRequest,
    smollm2: HookedSAETransformer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    output = tmp_path_factory.mktemp(request.param)
    cfg = runner_config(
        sae_config(
            request.param,
            d_in=576,
            d_sae=1_152,
            num_experts=8,
            k=16,
            decoder_init_norm=0.1,
            **NORMALIZED,
        ),
        output,
        model_name="smollm2",
        model_from_pretrained_kwargs={},
        hook_name=HOOK,
        context_size=64,
        exclude_special_tokens=True,
        training_tokens=10_240,
        train_batch_size_tokens=256,
        store_batch_size_prompts=8,
        n_batches_in_buffer=8,
        lr=2e-3,
        # Short enough for dead latents to be revived within the test.
        dead_feature_window=10,
        seed=0,
    )
    trained = make_runner(cfg, smollm2).run()
    return Run(cfg, trained, SAE.load_from_disk(output))


def activations(model: HookedSAETransformer) -> torch.Tensor:
    _, cache = model.run_with_cache(SENTENCE, names_filter=HOOK)
    return cache[HOOK][:, 1:]


@torch.no_grad()
def test_runner_exports_what_it_trained(run: Run, smollm2: HookedSAETransformer):
    cfg, sae, loaded = run
    assert loaded.cfg.architecture() == cfg.sae.architecture()
    assert loaded.cfg.metadata.hook_name == HOOK
    assert loaded.cfg.normalize_activations == "none"
    x = activations(smollm2)
    acts = loaded.encode(x)
    assert 0 < acts.count_nonzero(-1).max() <= 16
    torch.testing.assert_close(acts, sae.encode(x), atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(loaded(x), sae(x), atol=1e-2, rtol=1e-4)
    # Folded back to the scale of raw activations.
    assert (x - loaded(x)).pow(2).sum() < 0.5 * x.pow(2).sum()


def test_evaluation_with_everything_on(run: Run, smollm2: HookedSAETransformer):
    store = ActivationsStore.from_config(
        smollm2, run.cfg, override_dataset=small_corpus()
    )
    metrics, features = run_evals(
        run.exported,
        store,
        smollm2,
        ActivationScaler(),
        get_eval_everything_config(4, 1, 1),
        exclude_special_tokens=True,
    )
    quality = metrics["reconstruction_quality"]
    assert 0.3 < quality["explained_variance"] < 1
    assert 0 < metrics["sparsity"]["l0"] <= 16
    behaviour = metrics["model_performance_preservation"]
    assert behaviour["ce_loss_without_sae"] < behaviour["ce_loss_with_sae"]
    assert behaviour["ce_loss_with_sae"] < behaviour["ce_loss_with_ablation"]
    assert 0 < behaviour["ce_loss_score"] < 1
    assert len(features["feature_density"]) == 1_152
    assert all(math.isfinite(v) for v in features["encoder_norm"])
    json.dumps(metrics)


@torch.no_grad()
def test_splicing_with_the_error_term_leaves_the_logits_alone(
    run: Run, smollm2: HookedSAETransformer
):
    sae = run.exported
    clean = smollm2(SENTENCE)
    with_error = smollm2.run_with_saes(SENTENCE, saes=[sae], use_error_term=True)
    torch.testing.assert_close(with_error, clean, atol=2e-3, rtol=1e-4)
    without = smollm2.run_with_saes(SENTENCE, saes=[sae])
    assert (without - clean).abs().mean() > 0.05

    latent = 1_000

    def steer(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        acts[..., latent] += 30.0
        return acts

    smollm2.add_sae(sae, use_error_term=True)
    try:
        hooks: list[Any] = [(f"{HOOK}.hook_sae_acts_post", steer)]
        steered = smollm2.run_with_hooks(SENTENCE, fwd_hooks=hooks)
        _, cache = smollm2.run_with_cache(SENTENCE)
    finally:
        smollm2.reset_saes()
    assert (steered - clean).abs().mean() > 0.01
    e = run.trained.cfg.experts_per_token
    assert cache[f"{HOOK}.hook_expert_indices"].shape[-1] == e
    assert cache[f"{HOOK}.hook_sae_acts_post"].shape[-1] == 1_152
    torch.testing.assert_close(smollm2(SENTENCE), clean)

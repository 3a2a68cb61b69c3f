"""The whole way on a real language model, with SAELens's own runner and evaluation."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import small_corpus
from sae_lens import (
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
)
from sae_lens.config import LoggingConfig
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.saes.sae import SAE, TrainingSAE, TrainingSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

HOOK = "blocks.8.hook_resid_post"
SENTENCE = "I love apples but hate oranges completely."


@pytest.fixture(scope="module")
def corpus() -> Dataset:
    return small_corpus()


def runner_config(architecture: str, output: Path) -> LanguageModelSAERunnerConfig[Any]:
    return LanguageModelSAERunnerConfig(
        sae=TrainingSAEConfig.from_dict(
            {
                "architecture": architecture,
                "d_in": 576,
                "d_sae": 1_152,
                "num_experts": 8,
                "k": 16,
                "normalize_activations": "expected_average_only_in",
            }
        ),
        model_name="smollm2",
        model_from_pretrained_kwargs={},
        hook_name=HOOK,
        is_dataset_tokenized=False,
        context_size=64,
        exclude_special_tokens=True,
        training_tokens=20_480,
        train_batch_size_tokens=512,
        store_batch_size_prompts=8,
        n_batches_in_buffer=8,
        n_batches_for_norm_estimate=4,
        lr=2e-3,
        # Short enough for dead latents to be revived within the test.
        dead_feature_window=10,
        seed=0,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(output),
        verbose=False,
    )


@pytest.fixture(scope="module", params=["scale", "switch"])
def trained(
    request: pytest.FixtureRequest,
    smollm2: HookedSAETransformer,
    corpus: Dataset,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[TrainingSAE[Any], LanguageModelSAERunnerConfig[Any]]:
    cfg = runner_config(request.param, tmp_path_factory.mktemp(request.param))
    torch.manual_seed(0)
    sae = TrainingSAE.from_dict(cfg.get_training_sae_cfg_dict())
    store = ActivationsStore.from_config(smollm2, cfg, override_dataset=corpus)
    sae.initialize_from_activations(torch.cat([next(store) for _ in range(4)]))  # type: ignore[operator]
    runner = LanguageModelSAETrainingRunner(
        cfg, override_dataset=corpus, override_model=smollm2, override_sae=sae
    )
    return runner.run(), cfg


def activations(model: HookedSAETransformer) -> torch.Tensor:
    _, cache = model.run_with_cache(SENTENCE, names_filter=HOOK)
    return cache[HOOK][:, 1:]


@torch.no_grad()
def test_runner_exports_what_it_trained(
    trained: tuple[TrainingSAE[Any], LanguageModelSAERunnerConfig[Any]],
    smollm2: HookedSAETransformer,
):
    sae, cfg = trained
    loaded = SAE.load_from_disk(str(cfg.output_path))
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


def test_evaluation_with_everything_on(
    trained: tuple[TrainingSAE[Any], LanguageModelSAERunnerConfig[Any]],
    smollm2: HookedSAETransformer,
    corpus: Dataset,
):
    _, cfg = trained
    sae = SAE.load_from_disk(str(cfg.output_path))
    store = ActivationsStore.from_config(smollm2, cfg, override_dataset=corpus)
    metrics, features = run_evals(
        sae,
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
    trained: tuple[TrainingSAE[Any], LanguageModelSAERunnerConfig[Any]],
    smollm2: HookedSAETransformer,
):
    _, cfg = trained
    sae = SAE.load_from_disk(str(cfg.output_path))
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
    e = sae.cfg.experts_per_token  # type: ignore[attr-defined]
    assert cache[f"{HOOK}.hook_expert_indices"].shape[-1] == e
    assert cache[f"{HOOK}.hook_sae_acts_post"].shape[-1] == 1_152
    torch.testing.assert_close(smollm2(SENTENCE), clean)

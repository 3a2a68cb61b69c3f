"""SAEs in SAEBench: evaluations of a model and a text on this machine."""

import random
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem.gpt2_saes import N_LATENTS, export
from ecosystem.spelling_gpt2 import MARK
from integration import gpt2
from integration.runs import both_architectures
from sae_lens.saes.sae import SAE

# Only the environment of these tests has it.
core: Any = import_module("sae_bench.evals.core.main")
absorption: Any = import_module("sae_bench.evals.absorption.main")
vocabulary: Any = import_module("sae_bench.evals.absorption.vocab")
probing: Any = import_module("sae_bench.evals.sparse_probing_sae_probes.main")


@pytest.mark.usefixtures("hub_with_gpt2")
@both_architectures
def test_the_core_evaluation_measures_an_SAE_from_a_folder(
    architecture: str, text_folder: Path, tmp_path: Path
):
    sae = SAE.load_from_disk(export(architecture, tmp_path / "sae"))
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    (result,) = core.multiple_evals(
        [("ours", sae)],
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        eval_batch_size_prompts=4,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        dataset=str(text_folder),
        context_size=16,
        output_folder=str(tmp_path / "results"),
        device="cpu",
    )
    metrics = result["metrics"]
    assert 0 < metrics["sparsity"]["l0"] <= sae.cfg.k
    assert metrics["reconstruction_quality"]["mse"] > 0
    assert metrics["model_behavior_preservation"]["kl_div_score"] <= 1
    assert len(result["feature_metrics"]["feature_density"]) == N_LATENTS
    assert list((tmp_path / "results").glob("ours_custom_sae_*.json"))
    assert all((sae.state_dict()[name] == before[name]).all() for name in before)


@pytest.mark.usefixtures("hub_with_gpt2")
def test_sparse_probing_reads_the_texts_that_it_brings_along(tmp_path: Path):
    sae = SAE.load_from_disk(export("scale", tmp_path / "sae"))
    texts = "24_headline_isiran"
    config = probing.SparseProbingSaeProbesEvalConfig(
        model_name=gpt2.MODEL,
        dataset_names=[texts],
        ks=[1, 2],
        include_llm_baseline=False,
        results_path=str(tmp_path / "probes"),
        model_cache_path=str(tmp_path / "activations"),
    )
    results = probing.run_eval(
        config, [("ours", sae)], "cpu", str(tmp_path / "results")
    )
    (result,) = results.values()
    measured = result["eval_result_metrics"]["sae"]
    # Of a random model, near a coin's.
    assert 0.4 < measured["sae_top_1_test_accuracy"] < 0.7
    assert measured["sae_top_2_test_auc"] is not None


@torch.no_grad()
def _let_a_latent_absorb_the_letter_a(sae: SAE[Any]) -> None:
    """
    Give each expert one latent that says "begins with a", and one that takes over.

    The latter fires, in the former's place, on words that the model marks; no other latent
    fires on a word. Without a router all tokens have the same experts.
    """
    tensors = sae.state_dict()
    for name in ("W_enc", "W_router", "b_router", "b_dec"):
        tensors[name].zero_()
    tensors["b_enc"].fill_(-1)
    for first in range(0, N_LATENTS, N_LATENTS // sae.cfg.num_experts):
        for latent, mark, threshold in ((first, -4.0, 2.0), (first + 1, 4.0, 4.0)):
            tensors["W_enc"][[0, MARK], latent] = torch.tensor([4.0, mark])
            tensors["b_enc"][latent] = -threshold
            direction = torch.tensor([1.0, max(mark, 0.0)])
            tensors["W_dec"][latent] = 0
            tensors["W_dec"][latent, [0, MARK]] = direction / direction.norm()


@pytest.mark.usefixtures("hub_with_spelling_gpt2", "absorption_folder")
@both_architectures
def test_absorption_is_found_where_a_latent_takes_over_and_nowhere_else(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    sae = SAE.load_from_disk(export(architecture, tmp_path / "sae"))
    sae.fold_W_dec_norm()
    _let_a_latent_absorb_the_letter_a(sae)
    # The tokenizer's order is another one in each process, and words are drawn by it.
    all_tokens = vocabulary.get_tokens
    monkeypatch.setattr(
        vocabulary, "get_tokens", lambda *args, **kw: sorted(all_tokens(*args, **kw))
    )
    random.seed(0)
    torch.manual_seed(0)
    config = absorption.AbsorptionEvalConfig(
        model_name=gpt2.MODEL,
        max_k_value=2,
        # Two latents for a letter are not a split of it.
        f1_jump_threshold=1.0,
    )
    results = absorption.run_eval(config, [("ours", sae)], "cpu", str(tmp_path))
    (result,) = results.values()
    rates = {
        letter["first_letter"]: letter["full_absorption_rate"]
        for letter in result["eval_result_details"]
    }
    assert len(rates) == 26
    assert 0 < rates.pop("a") < 1
    assert not any(rates.values())
    assert list(tmp_path.glob("ours_custom_sae_*.json"))

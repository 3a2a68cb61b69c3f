"""SAEs in SAEBench: its core evaluation, of a model and a text on this machine."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from ecosystem.gpt2_saes import N_LATENTS, export
from integration import gpt2
from integration.runs import both_architectures
from sae_lens.saes.sae import SAE

# Only the environment of these tests has it.
core: Any = import_module("sae_bench.evals.core.main")
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

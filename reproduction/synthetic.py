"""
Activations made of known features, and how many of these features SAEs find.

The samples are SAELens's, of the kind of its SynthSAEBench-16k
(https://arxiv.org/abs/2602.14687): features that fire as rarely as a power law says, in trees
whose children exclude each other, correlated, and more of them than dimensions.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm, trange

from sae_lens_scale import recommended_config
from sae_lens_scale.analysis.scores import synthetic_scores
from sae_lens_scale.files import replacing_files
from sae_lens_scale.recipes import ARCHITECTURES

from .activations import ActivationCache, Activations
from .recipes import RECIPES
from .records import RunRecord, read, read_records
from .settings import RunSettings
from .tables import scores_table

# SynthSAEBench-16k as SAELens's documentation has it, but for the sizes: it has 16,384 features, 128
# trees and 768 dimensions.
MODEL = SyntheticModelConfig(
    num_features=1_024,
    hidden_dim=128,
    firing_probability=ZipfianFiringProbabilityConfig(
        exponent=0.5, max_prob=0.4, min_prob=5e-4
    ),
    hierarchy=HierarchyConfig(
        total_root_nodes=8,
        branching_factor=4,
        max_depth=3,
        mutually_exclusive_portion=1.0,
        compensate_probabilities=True,
        scale_children_by_parent=True,
    ),
    orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
    correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
    mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
    std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
    bias=0.5,
    seed=42,
)
TRAINING_SAMPLES = 2_000_000
TEST_SAMPLES = 20_480
# Twice as many latents as features, and about as many active ones as features fire together.
_WIDTH_FACTOR, _K = 2, 8
# Latents with which a training step of SAELens's TopK SAE takes about as much CPU time as one of the
# Scale SAE, in whole runs and in steps taken in turn (LOG.md).
_SAME_COST = (640, 896)
_BATCH = 1_024
_SAMPLES = "samples.safetensors"
# Names for people who do not know the others.
_ROWS = {
    "Scale 64/2 recommended": "Scale SAE, 2,048 latents, 2 of 64 experts",
    "Switch 32 recommended": "Switch SAE, 2,048 latents, 1 of 32 experts",
    "TopK 640": "dense TopK, 640 latents",
    "TopK 896": "dense TopK, 896 latents",
    "Full TopK 2048": "dense TopK, 2,048 latents",
}
# Scores by the column of the frame, with their headers.
SCORES: dict[str, tuple[str, Callable[[float], str]]] = {
    "recovered": ("recovered", "{:.1%}".format),
    "mcc": ("MCC", "{:.3f}".format),
    "uniqueness": ("uniqueness", "{:.3f}".format),
    "precision": ("precision", "{:.3f}".format),
    "recall": ("recall", "{:.3f}".format),
    "f1": ("F1", "{:.3f}".format),
    "alive": ("alive", "{:.1%}".format),
    "fvu": ("FVU", "{:.4f}".format),
    "step_ms": ("CPU ms per step", "{:.0f}".format),
}


def synthetic_runs(seeds: Sequence[int] = (0, 1, 2)) -> list[RunSettings]:
    """
    List the runs: a Scale SAE and a Switch SAE twice as wide as there are features, by the recommended
    recipe, and dense ones, by the laboratory's, of about the Scale SAE's cost and of its width.
    """
    width = _WIDTH_FACTOR * MODEL.num_features
    runs = []
    for architecture in ARCHITECTURES:
        cfg = recommended_config(
            architecture,
            # There is neither; the recipe does not ask.
            model_name="synthetic",
            hook_name="synthetic",
            dataset_path="synthetic",
            d_in=MODEL.hidden_dim,
            d_sae=width,
            k=_K,
            training_tokens=TRAINING_SAMPLES,
            train_batch_size_tokens=_BATCH,
            verbose=False,
        )
        runs.append(RunSettings.of_runner(cfg, "recommended"))
    dense = [("topk", d_sae) for d_sae in _SAME_COST]
    for architecture, d_sae in (*dense, ("full", width)):
        recipe: dict[str, Any] = RECIPES[architecture]
        sizes = {"k": _K, "d_sae": d_sae}
        run = RunSettings(
            architecture,
            **recipe | {"sae": recipe["sae"] | sizes},
            training_tokens=TRAINING_SAMPLES,
            batch_size=_BATCH,
        )
        runs.append(run)
    return [replace(run, seed=seed) for seed in seeds for run in runs]


def synthetic_activations(folder: str | Path) -> tuple[SyntheticModel, ActivationCache]:
    """
    Make the synthetic model, :data:`MODEL`, and samples of it to train on and to evaluate on, or read
    those that a folder has; all runs share them.

    Raises:
        ValueError: If the folder has another model's.
    """
    path = Path(folder, "activations")
    if not (path / _SAMPLES).exists():
        with replacing_files(path) as temporary:
            model = SyntheticModel(MODEL)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                samples = {
                    "train": _draw(model, TRAINING_SAMPLES),
                    "in_domain": _draw(model, TEST_SAMPLES),
                }
            model.save(temporary)
            save_file(samples, temporary / _SAMPLES)
    model = SyntheticModel.load_from_disk(path)
    if model.cfg != MODEL:
        raise ValueError(
            f"{path} has samples of another synthetic model: use another folder"
        )
    samples = load_file(path / _SAMPLES)
    train, in_domain = (Activations([samples[n]]) for n in ("train", "in_domain"))
    return model, ActivationCache(train, in_domain)


def _draw(model: SyntheticModel, number: int) -> torch.Tensor:
    samples = torch.empty(number, model.cfg.hidden_dim)
    for start in trange(0, number, _BATCH, desc="Samples", unit="batch"):
        part = samples[start : start + _BATCH]
        part.copy_(model.sample(len(part)))
    return samples


def score_records(folder: str | Path, model: SyntheticModel) -> list[RunRecord]:
    """
    Add ``measures["synthetic"]``, the :func:`.synthetic_scores`, to the records of a folder that lack
    it and have their weights (``keep_weights``).

    Each record is written as soon as it is measured. All are measured on the same samples,
    which none was trained on.

    Returns:
        The records that were measured.
    """
    pending = [
        record
        for record in read_records(folder)
        if "synthetic" not in record.measures and Path(folder, record.name).is_dir()
    ]
    for record in tqdm(pending, desc="Scores", unit="SAE"):
        sae = SAE.load_from_disk(Path(folder, record.name))
        with torch.random.fork_rng():
            torch.manual_seed(1)
            scores = synthetic_scores(sae, model, num_samples=TEST_SAMPLES)
        record.measures["synthetic"] = {"model": model.cfg.to_dict(), **scores}
        record.write(folder)
    return pending


def synthetic_table(folder: str | Path) -> str:
    """
    Make the table in Markdown of the runs of :func:`synthetic_runs`, of any seed, in a folder of records
    or of the tables made of them.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it has none of these runs, with scores.
    """
    runs = read(folder)
    if "recovered" in runs:
        names = [run.name for run in synthetic_runs(sorted(set(runs["seed"])))]
        runs = runs.loc[runs["name"].isin(names)].dropna(subset=["recovered"])
    if runs.empty or "recovered" not in runs:
        raise ValueError(f"{folder} has no records with scores on synthetic data")
    steps = runs["settings.training_tokens"] // runs["settings.batch_size"]
    rows = [_ROWS[label] for label in runs["label"]]
    runs = runs.assign(row=rows, step_ms=1_000 * runs["cpu_seconds"] / steps)
    order = sorted(range(len(rows)), key=lambda i: [*_ROWS.values()].index(rows[i]))
    return scores_table(runs.iloc[order], SCORES)

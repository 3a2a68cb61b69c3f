"""
Profile of a training run: SAELens's runner on the demo's model and text.

    python benchmarks/training.py --steps 60

Trains each SAE with SAELens's runner, first as it is, then with a fused Adam (see
sae_lens_scale.runner), then also from cached activations, under Python's profiler, which
needs no change to any code: the parts are functions of SAELens and torch. Half of the steps
have latents that count as dead, so that the dead-latent loss, which a long run pays for, is
paid for here too.
"""

import cProfile
import os
import pstats
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The demo's settings are in examples/.
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from machine import context, write_json
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.saes.sae import TrainingSAE
from simple_parsing import parse
from tables import training_tables

from examples.train_scale_smollm2 import DemoConfig, runner_configs
from sae_lens_scale.cache.writing import cache_activations
from sae_lens_scale.loading.language_model import load_language_model
from sae_lens_scale.loading.text import load_text
from sae_lens_scale.runner import InterruptibleTrainingRunner

# File and function of each part of a step; the rest of a step is bookkeeping.
PARTS = {
    "SAE forward": ("", "training_forward_pass"),
    "SAE backward": ("torch/_tensor.py", "backward"),
    "gradient clipping": ("torch/nn/utils/clip_grad.py", "clip_grad_norm_"),
    "Adam": ("torch/optim/adam.py", "step"),
}
STEP = ("sae_lens/training/sae_trainer.py", "step")
FIT = ("sae_lens/training/sae_trainer.py", "fit")


@dataclass
class Args:
    """
    Settings.

    Args:
        steps (int): Training steps of each run.
        batch_size (int): Tokens of each step.
        saes (list[str]): Which of the demo's SAEs to train.
        output (Path): Where to write the record.
    """

    steps: int = 60
    batch_size: int = 2_048
    saes: list[str] = field(default_factory=lambda: ["scale", "switch", "topk"])
    output: Path = Path(__file__).parent / "results" / "training-cpu.json"


def seconds(profiler: cProfile.Profile, part: tuple[str, str]) -> float:
    """Sum up the seconds in all functions of a name, with the functions they call."""
    file, name = part
    entries = pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
    return sum(
        cumulative
        for (path, _, function), (_, _, _, cumulative, _) in entries
        if function == name and path.endswith(file)
    )


def measure(
    runner_cfg: LanguageModelSAERunnerConfig[Any], fused: bool, steps: int, **real: Any
) -> dict[str, float]:
    """Train, and measure the milliseconds per step of each part."""
    runner_cfg = replace(runner_cfg, dead_feature_window=steps // 2)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        runner = InterruptibleTrainingRunner(
            replace(runner_cfg, output_path=folder),
            override_sae=TrainingSAE.from_dict(runner_cfg.get_training_sae_cfg_dict()),
            fused_optimizer=fused,
            **real,
        )
        profiler = cProfile.Profile()
        profiler.runcall(runner.run)
    parts = {name: seconds(profiler, part) for name, part in PARTS.items()}
    step, fit = seconds(profiler, STEP), seconds(profiler, FIT)
    # Adam's step and the trainer's have the same name, but not the same file.
    parts["bookkeeping"] = step - sum(parts.values())
    parts["language model and data"] = fit - step
    parts["whole"] = fit
    return {name: 1e3 * spent / steps for name, spent in parts.items()}


def main() -> None:
    args = parse(Args)
    cfg = DemoConfig(
        training_tokens=args.steps * args.batch_size, batch_size=args.batch_size
    )
    model = load_language_model(cfg.model, cfg.device)
    real: dict[str, Any] = {
        "override_dataset": load_text("docstrings", "train"),
        "override_model": model,
    }
    runners = runner_configs(cfg, model.cfg.d_model)
    settings = {"steps": args.steps, "batch_size": args.batch_size}
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as cache:
        runners = {
            name: replace(runner_cfg, cached_activations_path=cache)
            for name, runner_cfg in runners.items()
        }
        cache_activations(runners[args.saes[0]], **real)
        for name in args.saes:
            cached = replace(runners[name], use_cached_activations=True)
            for label, runner_cfg, fused, data in (
                (name, runners[name], False, real),
                (f"{name}, fused Adam", runners[name], True, real),
                (f"{name}, fused Adam, from cache", cached, True, {}),
            ):
                results[label] = measure(runner_cfg, fused, args.steps, **data)
                record = {
                    "context": context(cfg.device),
                    "settings": settings,
                    "results": results,
                }
                write_json(args.output, record)
                print(training_tables(record)["training"], flush=True)


if __name__ == "__main__":
    main()

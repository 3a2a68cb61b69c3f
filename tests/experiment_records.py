"""Records of every run of a preset, with made-up numbers."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from reproduction.presets import PRESETS
from reproduction.records import RunRecord

_FVU = {"Scale 64/2": 0.10, "Scale 256/8": 0.08, "Switch 32": 0.16, "TopK 576": 0.20}


def write_records(folder: Path, preset: str, seeds: tuple[int, ...] = (0, 1)) -> None:
    rng = np.random.default_rng(0)
    for run in PRESETS[preset].with_seeds(seeds):
        cfg = run.sae_config(576).to_dict()
        k, num_experts = cfg.get("k"), cfg.get("num_experts")
        # A Gated SAE's L0 is what its coefficient makes of it.
        k = k or round(100 / cfg["l1_coefficient"])
        fvu = _FVU.get(run.label, 0.12) + 0.01 * run.seed
        measures: dict[str, Any] = {
            "redundancy": {"share_above": 0.25},
            "activation_similarity": {"similarity": 0.1 + 0.01 * run.seed},
            "overlap_histogram": {"pairs": rng.integers(1, 9, k + 1).tolist()},
            "loss_recovered": {
                "contexts": 16,
                "in_domain": {"score": 1 - fvu},
                "other_domain": {"score": 1 - 2 * fvu},
            },
            "flops_per_token": {
                "training": {
                    "router": 37_000,
                    "encoder": 660_000,
                    "decoder": 1_150 * k,
                    "backward": 4_600 * k,
                    "total": 697_000 + 5_750 * k,
                }
            },
        }
        counts = [int(rng.integers(1, 99)) for _ in range(num_experts or 0)]
        if counts:
            similarity = {"intra": {"mean_cosine": 0.2}, "inter": {"mean_cosine": 0.1}}
            measures |= {
                "expert_usage": {"counts": counts},
                "expert_similarity": similarity,
            }
        if cfg.get("feature_scaling"):
            measures["scaling_factors"] = [float(rng.random()) for _ in counts]
        RunRecord(
            name=run.name,
            label=run.label,
            settings=asdict(run),
            sae_cfg=cfg,
            cache=None,
            environment={},
            seconds={"training": 60.0, "training_cpu": 50.0},
            curve=[
                {
                    "tokens": 64,
                    "seconds": 2.0,
                    "cpu_seconds": 1.0,
                    "fvu": fvu,
                    "mse": 5 * fvu,
                }
            ],
            in_domain={"fvu": fvu, "mse": 5 * fvu, "l0": float(k), "alive": 0.5},
            other_domain={"fvu": 0.1 + fvu, "mse": 0.5 + 5 * fvu},
            dead=0.1,
            measures=measures,
        ).write(folder)

"""
Which gate reconstructs best, and what do the other settings do? Trains SAEs that differ in one setting on the same tokens.

    python benchmarks/gates.py --tokens 400000 --seeds 2

Collects activations of SmolLM2-135M once, trains every SAE of ``RUNS`` on them with
SAELens's trainer, and evaluates on text that was not trained on. A run whose record
exists is not repeated, so an interrupted comparison goes on where it stopped.
"""

import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.util import get_special_token_ids
from simple_parsing import parse
from tqdm.auto import tqdm

import sae_lens_scale  # noqa: F401  (registers the architectures)
from sae_lens_scale.loading.docstrings import docstring_corpus
from sae_lens_scale.loading.language_model import fast_bfloat16
from sae_lens_scale.loading.smollm2 import load_smollm2
from sae_lens_scale.saes.mixture import MixtureSAEConfig, MixtureTrainingSAE

D_IN, D_SAE, K = 576, 18_432, 32
SCALE: dict[str, Any] = {"architecture": "scale", "topk_over": "activations"}
SWITCH: dict[str, Any] = {"architecture": "switch"}
RUNS: dict[str, dict[str, Any]] = {
    **{
        f"scale 64/2, {gate}": {**SCALE, "gate": gate}
        for gate in (
            "rescaled",
            "renormalized",
            "double_softmax",
            "softmax",
            "uniform",
        )
    },
    "scale 64/2, rescaled, TopK after the gate": {
        **SCALE,
        "topk_over": "gated_activations",
    },
    "scale 64/2, rescaled, no feature scaling": {**SCALE, "feature_scaling": False},
    "scale 64/2, rescaled, router not initialised": {**SCALE, "init": False},
    "scale 64/2, rescaled, alpha 0": {**SCALE, "load_balance_coefficient": 0.0},
    "scale 64/2, rescaled, alpha 0.3": {**SCALE, "load_balance_coefficient": 0.3},
    "scale 64/2, rescaled, no dead-latent loss": {
        **SCALE,
        "aux_loss_coefficient": 0.0,
    },
    "scale 64/2, rescaled, dead-latent loss 1/32": {
        **SCALE,
        "aux_loss_coefficient": 1 / 32,
    },
    "switch 32, softmax": {**SWITCH, "gate": "softmax"},
    "switch 32, uniform": {**SWITCH, "gate": "uniform"},
    "switch 32, uniform, router not initialised": {
        **SWITCH,
        "gate": "uniform",
        "init": False,
    },
    "switch 32, softmax, router not initialised": {
        **SWITCH,
        "gate": "softmax",
        "init": False,
    },
    "topk 576, as many latents per token": {"architecture": "topk", "d_sae": 576},
    "topk 18432, 32 times the encoder FLOPs": {
        "architecture": "topk",
        "use_sparse_activations": False,
    },
}


@dataclass
class Args:
    """Compare gates on SmolLM2-135M, blocks.8.hook_resid_post."""

    tokens: int = 400_000  # training tokens of each SAE
    seeds: int = 2  # number of seeds
    lr: float = 1.6e-3  # learning rate of all SAEs
    batch_size: int = 2048  # tokens per training step
    test_tokens: int = 50_000  # held-out tokens
    output: Path = Path("outputs/gates")  # records and activations
    only: str = ""  # run only what has this in its name
    overrides: str = "{}"  # JSON of config fields to set in all runs


def collect(args: Args, split: Any, n_tokens: int) -> torch.Tensor:
    """Raw activations [n_tokens, d_in] in bfloat16, shuffled, kept on disk."""
    path = args.output / f"activations-{split}-{n_tokens}.pt"
    if not path.exists():
        fast = fast_bfloat16("cpu")
        model = load_smollm2(dtype=torch.bfloat16 if fast else torch.float32)
        assert model.tokenizer is not None
        store = ActivationsStore(
            model=model,
            dataset=docstring_corpus(split),
            streaming=False,
            hook_name="blocks.8.hook_resid_post",
            hook_head_index=None,
            context_size=256,
            d_in=D_IN,
            n_batches_in_buffer=16,
            total_training_tokens=n_tokens,
            store_batch_size_prompts=16,
            train_batch_size_tokens=2048,
            prepend_bos=True,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
            exclude_special_tokens=torch.tensor(get_special_token_ids(model.tokenizer)),
        )
        batches = range(-(-n_tokens // 2048))
        rows = [
            next(store).bfloat16() for _ in tqdm(batches, desc=f"Activations, {split}")
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(torch.cat(rows)[:n_tokens], partial)
        partial.replace(path)
    return torch.load(path)


def train(args: Args, run: dict[str, Any], seed: int, acts: torch.Tensor) -> SAETrainer:
    torch.manual_seed(seed)
    settings = {"d_in": D_IN, "d_sae": D_SAE, "k": K, "aux_loss_coefficient": 1.0}
    settings |= json.loads(args.overrides)
    settings |= {k: v for k, v in run.items() if k != "init"}
    settings["normalize_activations"] = "expected_average_only_in"
    sae = TrainingSAE.from_dict(TrainingSAEConfig.from_dict(settings).to_dict())
    if isinstance(sae, MixtureTrainingSAE) and run.get("init", True):
        sae.initialize_from_activations(acts[: 200 * sae.cfg.num_experts].float())
    steps = args.tokens // args.batch_size
    cfg = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=args.tokens,
        device="cpu",
        autocast=False,
        lr=run.get("lr", args.lr),
        lr_end=0.0,
        lr_scheduler_name="constant",
        lr_warm_up_steps=steps // 20,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=steps // 5,
        n_restart_cycles=1,
        train_batch_size_samples=args.batch_size,
        dead_feature_window=max(1, 200_000 // args.batch_size),
        feature_sampling_window=steps + 1,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=50,
    )
    batches = acts[: steps * args.batch_size].split(args.batch_size)
    trainer = SAETrainer(
        cfg, sae, data_provider=(batch.float() for batch in cycle(batches))
    )
    trainer.fit()
    return trainer


@torch.no_grad()
def evaluate(trainer: SAETrainer, test: torch.Tensor) -> dict[str, float]:
    sae: Any = trainer.sae
    total = (test.double() - test.double().mean(0)).pow(2).sum().item()
    error, l0, fired, usage = 0.0, 0, torch.zeros(D_SAE, dtype=torch.bool), None
    for x in test.float().split(2048):
        acts = sae.encode(x)
        error += (sae.decode(acts) - x).double().pow(2).sum().item()
        l0 += acts.count_nonzero().item()
        fired[: acts.shape[1]] |= (acts != 0).any(0)
        if isinstance(sae.cfg, MixtureSAEConfig):
            indices = sae.route(x).indices.flatten()
            counts = indices.bincount(minlength=sae.cfg.num_experts)
            usage = counts if usage is None else usage + counts
    metrics = {
        "fvu": error / total,
        "l0": l0 / len(test),
        "alive": fired.float().mean().item() * D_SAE / sae.cfg.d_sae,
        "dead": trainer.dead_neurons.float().mean().item(),
    }
    if usage is not None:
        metrics["idle_experts"] = float((usage == 0).sum())
    return metrics


def table(records: list[dict[str, Any]]) -> str:
    lines = ["| SAE | FVU | alive on held-out | dead | idle experts | seeds |"]
    lines += ["|---|---|---|---|---|---|"]
    for name in dict.fromkeys(r["name"] for r in records):
        rows = [r for r in records if r["name"] == name]
        mean = {
            k: statistics.mean(r["metrics"][k] for r in rows)
            for k in rows[0]["metrics"]
        }
        spread = ""
        if len(rows) > 1:
            spread = f" ± {statistics.stdev(r['metrics']['fvu'] for r in rows):.4f}"
        idle = f"{mean['idle_experts']:.1f}" if "idle_experts" in mean else "-"
        lines.append(
            f"| {name} | {mean['fvu']:.4f}{spread} | {mean['alive']:.0%} | "
            f"{mean['dead']:.0%} | {idle} | {len(rows)} |"
        )
    return "\n".join(lines)


def main() -> None:
    args = parse(Args)
    acts = collect(args, "train", args.tokens)
    test = collect(args, "test", args.test_tokens)
    records = []
    # What a record must agree in to count as the same run.
    where = ("output", "only", "seeds")
    settings = {k: v for k, v in asdict(args).items() if k not in where}
    for seed in range(args.seeds):
        for name, run in RUNS.items():
            if args.only not in name:
                continue
            stem = "".join(c if c.isalnum() else "-" for c in name)
            path = args.output / f"{stem}-lr{args.lr}-seed{seed}.json"
            record = json.loads(path.read_text()) if path.exists() else {}
            if record.get("run") != run or record.get("args") != settings:
                start = time.perf_counter()
                metrics = evaluate(train(args, run, seed, acts), test)
                record = {"name": name, "seed": seed, "run": run, "metrics": metrics}
                record |= {"seconds": time.perf_counter() - start, "args": settings}
                partial = path.with_suffix(".partial")
                partial.write_text(json.dumps(record, indent=1))
                partial.replace(path)
            records.append(record)
            print(table(records), flush=True)
    (args.output / "table.md").write_text(table(records) + "\n")


if __name__ == "__main__":
    main()

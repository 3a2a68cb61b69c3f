"""``sae-lens-scale info``: a description of an SAE."""

import argparse
from typing import Any

import torch

from sae_lens_scale.files import dump_json
from sae_lens_scale.saes.mixture import MixtureSAE

from .output import table
from .sae_argument import add_sae, load_sae

_METADATA = (
    "model_name",
    "hook_name",
    "hook_head_index",
    "dataset_path",
    "context_size",
    "l0",
    "num_dead_features",
)


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of an argparse parser."""
    parser = commands.add_parser("info", help="describe an SAE")
    add_sae(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> str:
    sae = load_sae(options.sae, options.sae_id, device="cpu", dtype=None)
    metadata = sae.cfg.metadata
    facts: dict[str, Any] = {
        name: value
        for name, value in sae.cfg.to_dict().items()
        if name not in ("metadata", "device")
    }
    if isinstance(sae, MixtureSAE):
        facts["experts_per_token"] = sae.cfg.experts_per_token
        facts["latents_per_expert"] = sae.cfg.expert_size
    facts["parameters"] = sum(p.numel() for p in sae.parameters())
    facts |= {name: metadata[name] for name in _METADATA}
    if metadata.omega:
        omega = torch.tensor(metadata.omega, dtype=torch.float64)
        facts["omega"] = {
            "mean": omega.mean().item(),
            "std": omega.std(correction=0).item(),
            "min": omega.min().item(),
            "max": omega.max().item(),
        }
    facts["training"] = metadata.training_architecture_details
    facts = {name: fact for name, fact in facts.items() if fact is not None}
    return dump_json(facts) if options.json else table(facts)

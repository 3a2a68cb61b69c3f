"""SAEs of a small random GPT-2: tools load the models that TransformerLens lists."""

from pathlib import Path
from typing import Any

import torch
from integration import gpt2
from integration.runs import sae_config
from sae_lens.saes.sae import TrainingSAE

HOOK = "blocks.1.hook_resid_post"
SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 4}
N_LATENTS = 64


def export(architecture: str, folder: Path) -> Path:
    """An untrained SAE, exported to a folder."""
    metadata: dict[str, Any] = {
        "model_name": gpt2.MODEL,
        "hook_name": HOOK,
        "context_size": 16,
        "prepend_bos": True,
        "model_from_pretrained_kwargs": {},
    }
    torch.manual_seed(0)
    cfg = sae_config(architecture, d_sae=N_LATENTS, metadata=metadata)
    TrainingSAE.from_dict(cfg.to_dict()).save_inference_model(folder)
    return folder

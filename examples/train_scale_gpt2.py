"""
Train a Scale SAE on GPT-2 small with the paper's settings. Needs the Hugging Face hub.

Sizes, hook, number of steps and the recipe are those of Xu et al., "Beyond Redundancy: Diverse
and Specialized Multi-Expert Sparse Autoencoder", and of its authors' code. Without ``recipe`` it
is the recommended one, which reconstructed better in short runs (docs/defaults.md).
"""

import torch
from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.config import LoggingConfig

from sae_lens_scale import recommended_config

settings = recommended_config(
    "scale",
    recipe="paper",
    model_name="gpt2",
    hook_name="blocks.8.hook_resid_post",
    dataset_path="Skylion007/openwebtext",
    d_in=768,
    d_sae=24_576,
    k=32,
    # 10,000 steps.
    training_tokens=81_920_000,
    device="cuda" if torch.cuda.is_available() else "cpu",
    logger=LoggingConfig(log_to_wandb=False),
    checkpoint_path=None,
    output_path="outputs/scale-gpt2",
)

if __name__ == "__main__":
    LanguageModelSAETrainingRunner(settings).run()

"""
Train a Scale SAE on GPT-2 small with the paper's settings. Needs the Hugging Face hub.

Sizes, hook and number of steps are those of Xu et al., "Beyond Redundancy: Diverse and
Specialized Multi-Expert Sparse Autoencoder"; gate, learning rate and normalisation are
this package's defaults and the best that were measured here, not theirs (see docs/defaults.md).
"""

import torch
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.config import LoggingConfig

from sae_lens_scale import ScaleTrainingSAEConfig
from sae_lens_scale.upstream import buffer_argument

STEPS = 10_000
BATCH_SIZE = 4_096

settings = LanguageModelSAERunnerConfig(
    sae=ScaleTrainingSAEConfig(
        d_in=768,
        d_sae=24_576,
        num_experts=64,
        experts_per_token=2,
        k=32,
        normalize_activations="expected_average_only_in",
    ),
    model_name="gpt2",
    hook_name="blocks.8.hook_resid_post",
    dataset_path="Skylion007/openwebtext",
    is_dataset_tokenized=False,
    context_size=128,
    exclude_special_tokens=True,
    training_tokens=STEPS * BATCH_SIZE,
    train_batch_size_tokens=BATCH_SIZE,
    n_batches_for_norm_estimate=100,
    # In contexts. SAELens's default, 20, is less than one batch of this size.
    **buffer_argument(512),
    lr=1.6e-3,
    lr_warm_up_steps=STEPS // 20,
    lr_decay_steps=STEPS // 5,
    device="cuda" if torch.cuda.is_available() else "cpu",
    logger=LoggingConfig(log_to_wandb=False),
    checkpoint_path=None,
    output_path="outputs/scale-gpt2",
)

if __name__ == "__main__":
    LanguageModelSAETrainingRunner(settings).run()

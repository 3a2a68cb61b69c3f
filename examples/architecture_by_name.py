"""
The string "scale" is enough wherever SAELens takes an architecture.

Trains one small SAE from a plain dictionary, and shows that SAELens's command line
knows `--architecture scale` once the package is imported.
"""

import os
from dataclasses import dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.config import LoggingConfig
from sae_lens.saes.sae import TrainingSAEConfig
from simple_parsing import parse

import sae_lens_scale  # noqa: F401  (makes the names known)
from sae_lens_scale.loading.docstrings import docstring_corpus
from sae_lens_scale.loading.smollm2 import load_smollm2
from sae_lens_scale.upstream import _parse_cfg_args, buffer_argument


@dataclass
class Settings:
    architecture: str = "scale"
    training_tokens: int = 100_000
    output: str = "outputs/by-name"


def main(settings: Settings) -> None:
    sae = TrainingSAEConfig.from_dict(
        {
            "architecture": settings.architecture,
            "d_in": 576,
            "d_sae": 4_608,
            "num_experts": 16,
            "k": 32,
            "normalize_activations": "expected_average_only_in",
        }
    )
    runner = LanguageModelSAETrainingRunner(
        LanguageModelSAERunnerConfig(
            sae=sae,
            model_name="smollm2",
            hook_name="blocks.8.hook_resid_post",
            is_dataset_tokenized=False,
            exclude_special_tokens=True,
            training_tokens=settings.training_tokens,
            train_batch_size_tokens=1_024,
            store_batch_size_prompts=8,
            **buffer_argument(8),
            n_batches_for_norm_estimate=5,
            lr=1.6e-3,
            logger=LoggingConfig(log_to_wandb=False),
            checkpoint_path=None,
            output_path=settings.output,
        ),
        override_model=load_smollm2(),
        override_dataset=docstring_corpus("train"),
    )
    print(f"trained {type(runner.run()).__name__} into {settings.output}")

    arguments = f"--architecture {settings.architecture} --num_experts 16 --k 8"
    print(f"{arguments}: {type(_parse_cfg_args(arguments.split()).sae).__name__}")


if __name__ == "__main__":
    main(parse(Settings))

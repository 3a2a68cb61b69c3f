"""
Run a script with SAELens's training runs in it cut short, for the tests.

    python short_run.py SCRIPT [ARGUMENTS]

What the script trains, on what and how stays as it is; only how long does not.
"""

import runpy
import sys

from sae_lens import LanguageModelSAERunnerConfig

# Two steps.
SHORT = {
    "training_tokens": 512,
    "train_batch_size_tokens": 256,
    "store_batch_size_prompts": 4,
    "n_batches_in_buffer": 8,
    "n_batches_for_norm_estimate": 1,
    "lr_warm_up_steps": 0,
    "lr_decay_steps": 0,
}


def shorten_runs() -> None:
    complete = LanguageModelSAERunnerConfig.__post_init__

    def complete_short(self: LanguageModelSAERunnerConfig) -> None:
        vars(self).update(SHORT)
        complete(self)

    LanguageModelSAERunnerConfig.__post_init__ = complete_short


if __name__ == "__main__":
    shorten_runs()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")

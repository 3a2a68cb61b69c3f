"""
Train, evaluate and explain a Scale SAE on SmolLM2-135M; what `make demo` runs.

Every setting is an option: `--training_tokens 2000000`, `--num_experts 256`, or
`--model gpt2 --dataset Skylion007/openwebtext` with a model hub at hand.
"""

import os
import warnings

# On shared cores OpenMP's default, spinning, costs more time than the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from simple_parsing import parse

from reproduction.demo import DemoConfig, run_demo

if __name__ == "__main__":
    # Neither is news to a reader of the demo.
    for message in ("The training dataset contains fewer", "Dataset is not tokenized"):
        warnings.filterwarnings("ignore", message)
    run_demo(parse(DemoConfig))

"""
Cost of caching activations, and what training on them saves, on the demo's model and text.

    python benchmarks/caching.py --rounds 3

Caches a text with this package and with SAELens's CacheActivationsRunner, trains the demo's
Scale SAE with the language model and from the cache, and reads the cache and the text alone;
all in turn, and several times.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The demo's settings are in examples/.
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from machine import Run, Stopwatch, context, interleave, write_json
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.load_model import load_model
from sae_lens.training.activations_store import ActivationsStore
from simple_parsing import parse
from tables import caching_tables

from examples.train_scale_smollm2 import DemoConfig, runner_configs
from sae_lens_scale.cache.store import cached_batches, cached_tokens
from sae_lens_scale.cache.writing import cache_activations
from sae_lens_scale.loading.smollm2 import smollm2_folder
from sae_lens_scale.loading.text import load_text
from sae_lens_scale.runner import InterruptibleTrainingRunner
from sae_lens_scale.upstream import buffer_argument

_LAYER = 8


@dataclass
class Args:
    """
    Settings.

    Args:
        tokens (int): Tokens to cache and to train on; by default those of one shard.
        batch_size (int): Tokens of each training step.
        rounds (int): Rounds, of which the medians are shown.
        output (Path): Where to write the record.
    """

    tokens: int = 30_720
    batch_size: int = 2_048
    rounds: int = 3
    output: Path = Path(__file__).parent / "results" / "caching-cpu.json"


class Work:
    """
    Work that is timed; each method returns the number of its tokens.

    Args:
        args: The benchmark's settings.
        folder: Folder for files.
    """

    def __init__(self, args: Args, folder: Path):
        self.folder = folder
        self.tokens = args.tokens
        demo = DemoConfig(training_tokens=args.tokens, batch_size=args.batch_size)
        self.text: Any = load_text("docstrings", "train")
        self.model = load_model(
            "AutoModelForCausalLM", str(smollm2_folder()), demo.device
        )
        cfg = runner_configs(demo, 576)["scale"]
        self.cfg: LanguageModelSAERunnerConfig[Any] = replace(
            cfg,
            # Clustering of the first batches is paid for once, in a run of any length.
            sae=replace(cfg.sae, initialize_from_activations=False),
            model_name=str(smollm2_folder()),
            model_class_name="AutoModelForCausalLM",
            hook_name=f"model.layers.{_LAYER}",
            cached_activations_path=str(folder / "cache"),
            output_path=None,
        )
        cache_activations(self.cfg, self.text, self.model)

    def train(self, watch: Stopwatch, *, cached: bool) -> int:
        """Train, with the language model or from the cache."""
        contexts = 2 * self.cfg.train_batch_size_tokens // self.cfg.context_size
        # Of another buffer a run this short would use half of what the language model does.
        cfg = replace(
            deepcopy(self.cfg),
            use_cached_activations=cached,
            **buffer_argument(contexts),
        )
        real: dict[str, Any] = {}
        if not cached:
            real = {"override_model": self.model, "override_dataset": self.text}
        torch.manual_seed(0)
        runner = InterruptibleTrainingRunner(cfg, fused_optimizer=True, **real)
        watch.lap("set-up")
        runner.run()
        watch.lap("work")
        return self.tokens

    def write(self, watch: Stopwatch) -> int:
        """Cache with this package."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            cfg = copy(self.cfg)
            cfg.cached_activations_path = folder
            watch.lap("set-up")
            tokens = cache_activations(cfg, self.text, self.model)
            watch.lap("work")
        return tokens

    def write_as_saelens(self, watch: Stopwatch, *, shuffle: bool) -> int:
        """Cache with SAELens."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            runner = CacheActivationsRunner(
                CacheActivationsRunnerConfig(
                    dataset_path=self.cfg.dataset_path,
                    model_name=self.cfg.model_name,
                    model_class_name=self.cfg.model_class_name,
                    hook_name=self.cfg.hook_name,
                    d_in=576,
                    context_size=self.cfg.context_size,
                    training_tokens=self.tokens,
                    model_batch_size=self.cfg.store_batch_size_prompts,
                    autocast_lm=self.cfg.autocast_lm,
                    new_cached_activations_path=folder,
                    shuffle=shuffle,
                    # All of them, and no more: it caches whole buffers.
                    buffer_size_gb=self.tokens * 576 * 4 / 1e9,
                    device="cpu",
                ),
                override_dataset=self.text,
            )
            watch.lap("set-up")
            rows = runner.run().num_rows
            watch.lap("work")
        return rows * self.cfg.context_size

    def read(self, watch: Stopwatch) -> int:
        """Read the cache as training does."""
        batches = cached_batches(
            self.cfg, self.cfg.sae, slice(None), cached_tokens(self.cfg)
        )
        watch.lap("set-up")
        # Ten epochs.
        tokens = sum(
            len(batch)
            for batch in islice(
                batches, 10 * self.tokens // self.cfg.train_batch_size_tokens
            )
        )
        watch.lap("work")
        return tokens

    def tokenize(self, watch: Stopwatch) -> int:
        """Read the text as training does, without the language model."""
        store = ActivationsStore.from_config(self.model, self.cfg, self.text)
        watch.lap("set-up")
        contexts = islice(
            store.iterable_sequences, self.tokens // self.cfg.context_size
        )
        tokens = sum(map(len, contexts))
        watch.lap("work")
        return tokens


def main() -> None:
    args = parse(Args)
    with tempfile.TemporaryDirectory() as folder:
        work = Work(args, Path(folder))
        timed: dict[str, Callable[[Stopwatch], int]] = {
            "train with the language model": partial(work.train, cached=False),
            "train from the cache": partial(work.train, cached=True),
            "cache": work.write,
            "cache, SAELens": partial(work.write_as_saelens, shuffle=False),
            "cache, SAELens, shuffle": partial(work.write_as_saelens, shuffle=True),
            "read the cache": work.read,
            "tokenize": work.tokenize,
        }
        tokens: dict[str, int] = {}

        def start(name: str) -> Run:
            return lambda watch: tokens.update({name: timed[name](watch)})

        starts = {name: partial(start, name) for name in timed}
        records = interleave(starts, args.rounds, "cpu", "caching")
    record = {
        "context": context("cpu"),
        "settings": {n: value for n, value in vars(args).items() if n != "output"},
        "tokens": tokens,
        "results": records,
    }
    write_json(args.output, record)
    print(caching_tables(record)["caching"])


if __name__ == "__main__":
    main()

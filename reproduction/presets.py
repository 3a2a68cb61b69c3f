"""Presets: named grids of runs."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.registry import get_sae_training_class

from sae_lens_scale import recommended_config
from sae_lens_scale.recipes import ARCHITECTURES, Architecture

from .activations import CacheSettings
from .recipes import RECIPES
from .settings import RunSettings

# The best found for a Switch SAE with the gate of its authors; the recipe has another gate.
_SOFTMAX_SWITCH = {"gate": "softmax", "aux_loss_coefficient": 1 / 32}
_SOFTMAX_DEAD_AFTER = 50_000
# Switch SAE as Mudide et al. train it: the winner's probability for a gate, no k-means, and
# their rule for the learning rate. Their weight 3 of load balancing is for raw activations;
# on normalised ones, of unit variance, it is of this order.
_AUTHORS_SWITCH = {**_SOFTMAX_SWITCH, "load_balance_coefficient": 0.1}
# (num_experts, experts_per_token) with equally many active latents.
_SIZES = ((64, 2), (128, 4), (256, 8))
_BEST_SCALE = {"num_experts": 256, "experts_per_token": 8, "num_shared_experts": 1}
_BEST_VARIANT = "1 shared"
# In long runs a learning rate that falls for longer lowers the error of the best Scale SAE, at
# k = 16 and more.
_EARLY_DECAY = {"variant": f"{_BEST_VARIANT} early decay", "lr_decay_fraction": 0.5}
# The best Scale SAE of all has finer experts. At k = 64 more shared experts and a smaller beta_1
# lower its error.
_FINE_SCALE = {"num_experts": 512, "experts_per_token": 16}
_SHARED_OF_FINE = 2
_LARGE_K = 64
_SHARED_AT_LARGE_K = 6
_BETA1_AT_LARGE_K = 0.8
# The coefficient of Gao et al.
_MULTI_TOPK = 1 / 8
# Runs as users make them: by the recommended recipe; by the architecture's name and sizes alone, with
# SAELens's defaults; and likewise in version 0.1.0.
VARIANTS_OF_DEFAULTS = (
    "recommended",
    "SAELens's defaults",
    "SAELens's defaults, 0.1.0",
)
_L1_COEFFICIENTS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True)
class Preset:
    """
    A grid of runs, for each of the seeds.

    Presets of one base share a folder, activations, and runs that they have in common.
    """

    base: str
    cache: CacheSettings
    runs: tuple[RunSettings, ...]
    seeds: tuple[int, ...] = (0, 1)

    def with_seeds(self, seeds: Iterable[int] | None = None) -> list[RunSettings]:
        """List all runs, seed by seed, so that a grid that is cut short has whole seeds."""
        chosen = self.seeds if seeds is None else tuple(seeds)
        return [replace(run, seed=seed) for seed in chosen for run in self.runs]


def _with_revival(run: RunSettings) -> RunSettings:
    """Revive dead latents sooner than the recipe does, and with twice the weight."""
    weight = 2 * run.sae["aux_loss_coefficient"]
    return replace(
        run,
        dead_after_tokens=2 * run.dead_after_tokens // 5,
        sae={**run.sae, "aux_loss_coefficient": weight},
        variant=f"{run.variant} revival".strip(),
    )


def _with_multi_topk(run: RunSettings) -> RunSettings:
    """Let more latents learn from each token than are kept."""
    return replace(
        run,
        sae={**run.sae, "multi_topk_coefficient": _MULTI_TOPK},
        variant=f"{run.variant} Multi-TopK".strip(),
    )


# The names of runs leave out defaults: a run that two presets have in common has one name.
@dataclass(frozen=True)
class _Experiment:
    base: str
    cache: CacheSettings
    d_in: int
    ks: tuple[int, ...]
    training: dict[str, Any]
    # Number of experts with which a training step of a Switch SAE takes about as many FLOPs as
    # one of the best Scale SAE, whose router takes a large part of them.
    switch_experts_of_equal_flops: int
    # Settings of the Switch SAE as its authors train it.
    authors: dict[str, Any]
    # Values of k and settings of the ablations.
    ablation_ks: tuple[int, ...]
    ablation_training: dict[str, Any]
    # Training tokens of the runs of different lengths.
    lengths: tuple[int, ...]

    def run(
        self, architecture: str, sae: dict[str, Any], **changes: Any
    ) -> RunSettings:
        """A run by the architecture's recipe, but for these fields and settings."""
        recipe = RECIPES[architecture]
        sae = {"d_sae": 32 * self.d_in, **recipe.get("sae", {}), **sae}
        how = {**recipe, **self.training, **changes, "sae": sae}
        return RunSettings(architecture, **how)

    def softmax_switch(self, sae: dict[str, Any], **changes: Any) -> RunSettings:
        how = {"dead_after_tokens": _SOFTMAX_DEAD_AFTER, **self.training}
        return self.run(
            "switch",
            {"num_experts": 32, **_SOFTMAX_SWITCH, **sae},
            **{**how, "lr_factors": {}, **changes},
        )

    def fine_scale(self, k: int) -> RunSettings:
        """Combine all that was found to help in a 512/16, named by Multi-TopK alone."""
        sae = {"k": k, **_FINE_SCALE, "num_shared_experts": _SHARED_OF_FINE}
        changes: dict[str, Any] = {
            "lr_decay_fraction": _EARLY_DECAY["lr_decay_fraction"]
        }
        if k >= _LARGE_K:
            sae["num_shared_experts"] = _SHARED_AT_LARGE_K
            changes["adam_beta1"] = _BETA1_AT_LARGE_K
        run = _with_revival(self.run("scale", sae, **changes))
        return _with_multi_topk(replace(run, variant=""))

    def best(self, k: int) -> RunSettings:
        """The best Scale SAE of 256 experts."""
        return self.run("scale", {"k": k, **_BEST_SCALE}, **_EARLY_DECAY)

    def of_64(self, k: int, e: int = 2, **sae: Any) -> RunSettings:
        """A Scale SAE of 64 experts, e of them active, with an ablation's training."""
        sae = {"k": k, "num_experts": 64, "experts_per_token": e, **sae}
        return self.run("scale", sae, **self.ablation_training)

    def main(self) -> list[RunSettings]:
        """The architectures, at every k."""
        runs = []
        for k in self.ks:
            runs += [
                self.run("scale", {"k": k, "num_experts": n, "experts_per_token": e})
                for n, e in _SIZES
            ]
            runs += [
                self.run("scale", {"k": k, **_BEST_SCALE}, variant=_BEST_VARIANT),
                best := self.best(k),
                _with_revival(best),
                _with_multi_topk(best),
                self.fine_scale(k),
                switch := self.run("switch", {"k": k, "num_experts": 32}),
                _with_revival(switch),
                switch_multi_topk := _with_multi_topk(switch),
                softmax := self.softmax_switch({"k": k}, variant="softmax"),
                _with_multi_topk(softmax),
                self.softmax_switch(
                    {"k": k, **_AUTHORS_SWITCH},
                    adam_beta2=0.999,
                    initialization="default",
                    variant="authors",
                    **self.authors,
                ),
                self.run("topk", {"k": k, "d_sae": self.d_in}),
            ]
            if k >= _LARGE_K:
                # As Scale SAE has it at these k.
                runs.append(
                    replace(
                        switch_multi_topk,
                        adam_beta1=_BETA1_AT_LARGE_K,
                        variant=f"{switch_multi_topk.variant} beta {_BETA1_AT_LARGE_K}",
                    )
                )
        # The ceiling, at few k: a run takes about five times as long as a Scale SAE's.
        for k in (8, 32, 64):
            runs += [full := self.run("full", {"k": k}), _with_multi_topk(full)]
        runs += [
            self.run("gated", {"d_sae": self.d_in, "l1_coefficient": l1})
            for l1 in _L1_COEFFICIENTS
        ]
        return runs

    def flops(self) -> list[RunSettings]:
        """The best Scale SAE, Switch SAE of the same encoder FLOPs, and of all its FLOPs."""
        return [
            self.best(32),
            *(
                self.run("switch", {"k": 32, "num_experts": num_experts})
                for num_experts in (32, self.switch_experts_of_equal_flops)
            ),
        ]

    def time(self) -> list[RunSettings]:
        """The best Scale SAE, and a dense one of its width that takes no less CPU time."""
        # A token takes the dense SAE four to five times as long, and at first longer.
        tokens = self.training["training_tokens"] // 4
        dense = self.run(
            "full", {"k": 32}, training_tokens=tokens, variant="a quarter of the tokens"
        )
        return [self.best(32), dense]

    def length(self) -> list[RunSettings]:
        """
        Training of different lengths, each run with a whole schedule.

        That of the Scale SAE is the one for long runs, which loses in short ones.
        """
        return [
            replace(run, training_tokens=tokens)
            for tokens in self.lengths
            for run in (
                self.best(32),
                self.run("switch", {"k": 32, "num_experts": 32}),
                self.run("topk", {"k": 32, "d_sae": self.d_in}),
            )
        ]

    def experts(self) -> list[RunSettings]:
        """Numbers of selected experts, of 64, with and without feature scaling."""
        return [
            self.of_64(k, e, feature_scaling=scaling)
            for k in self.ablation_ks
            for e in (1, 2, 4, 8, 16)
            for scaling in (True, False)
        ]

    def scaling(self) -> list[RunSettings]:
        """Feature scaling with the gates of the paper and of its authors' code."""
        return [
            self.of_64(32, e, gate=gate, feature_scaling=scaling)
            for gate in ("softmax", "double_softmax")
            for e in (2, 16)
            for scaling in (True, False)
        ]

    def decompositions(self) -> list[RunSettings]:
        """Decompositions: the part of an encoder row that feature scaling amplifies."""
        return [
            self.of_64(k, decomposition=decomposition)
            for k in self.ablation_ks
            for decomposition in ("mean", "identity", "learned")
        ]

    def recipe(self) -> list[RunSettings]:
        """The best Scale SAE, without one part of its recipe at a time."""
        best = {"k": 32, **_BEST_SCALE}
        batch_size = 2 * self.training["batch_size"]
        others: dict[str, dict[str, Any]] = {
            "no shared expert": {"sae": {"num_shared_experts": 0}},
            "TopK before the gate": {"sae": {"topk_over": "activations"}},
            "no feature scaling": {"sae": {"feature_scaling": False}},
            "dead-latent loss 1/32": {"sae": {"aux_loss_coefficient": 1 / 32}},
            "no dead-latent loss": {"sae": {"aux_loss_coefficient": 0.0}},
            "alpha 0": {"sae": {"load_balance_coefficient": 0.0}},
            "alpha 0.3": {"sae": {"load_balance_coefficient": 0.3}},
            "dead after 200,000 tokens": {"dead_after_tokens": 200_000},
            "router as fast as the rest": {"lr_factors": {}},
            "beta 0.999": {"adam_beta2": 0.999},
            "steps twice as large": {"batch_size": batch_size},
            "no k-means": {"initialization": "default"},
        }
        runs = []
        for variant, changes in {_BEST_VARIANT: {}, **others}.items():
            sae = best | changes.pop("sae", {})
            how = {**self.ablation_training, **changes, "variant": variant}
            runs.append(self.run("scale", sae, **how))
        return runs

    def _as_users(
        self, k: int, tokens: int | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Sizes of an SAE, and a runner's text, as a user names them."""
        sizes = {"d_in": self.d_in, "d_sae": 32 * self.d_in, "k": k}
        text = {
            "model_name": self.cache.model,
            "hook_name": self.cache.hook_name,
            "dataset_path": self.cache.text,
            "training_tokens": tokens or self.training["training_tokens"],
            "verbose": False,
        }
        return sizes, text

    def recommended(
        self,
        architecture: Architecture,
        k: int,
        variant: str = "",
        tokens: int | None = None,
        **sae: Any,
    ) -> RunSettings:
        """A run by the recommended recipe, but for these fields of the SAE."""
        sizes, text = self._as_users(k, tokens)
        cfg = recommended_config(architecture, **sizes, **text, sae=sae)
        name = f"{VARIANTS_OF_DEFAULTS[0]} {variant}".strip()
        return RunSettings.of_runner(cfg, name)

    def _of_users(
        self, architecture: Architecture, k: int, tokens: int | None = None
    ) -> list[RunSettings]:
        """Runs as users make them: :data:`VARIANTS_OF_DEFAULTS`."""
        _, stock, old = VARIANTS_OF_DEFAULTS
        sizes, text = self._as_users(k, tokens)
        sae_class = get_sae_training_class(architecture)[1]
        alone = LanguageModelSAERunnerConfig(sae=sae_class(**sizes), **text)
        run = RunSettings.of_runner(alone, stock)
        # SAELens's own default, which the SAEs had then.
        then = {**sizes, "normalize_activations": "none"}
        del then["d_in"]
        return [
            self.recommended(architecture, k, tokens=tokens),
            run,
            replace(run, sae=then, variant=old),
        ]

    def defaults(self) -> list[RunSettings]:
        """Runs as users make them, the best that was found, and a dense SAE of the same cost."""
        runs = []
        for k, architecture in product(self.ks, ARCHITECTURES):
            runs += self._of_users(architecture, k)
        for k in self.ks:
            switch = self.run("switch", {"k": k, "num_experts": 32})
            runs += [
                self.fine_scale(k),
                _with_multi_topk(self.best(k)),
                _with_multi_topk(switch),
                self.run("topk", {"k": k, "d_sae": self.d_in}),
            ]
        return runs

    def short_defaults(self) -> list[RunSettings]:
        """Runs as users make them, of two fifths of the tokens."""
        tokens = 2 * self.training["training_tokens"] // 5
        return [run for a in ARCHITECTURES for run in self._of_users(a, 32, tokens)]

    def evidence(self) -> list[RunSettings]:
        """Recommended SAEs, dense ones of their cost and of their width, and parts of Scale SAE."""
        k = 32
        return [
            self.recommended("scale", k),
            self.recommended("switch", k),
            self.run("topk", {"k": k, "d_sae": self.d_in}),
            self.run("full", {"k": k}),
            self.recommended("scale", k, "no feature scaling", feature_scaling=False),
            self.recommended("scale", k, "no shared expert", num_shared_experts=0),
            # A Switch SAE with feature scaling and the dead-latent loss of Scale SAE.
            self.recommended(
                "scale",
                k,
                "one expert",
                num_experts=32,
                experts_per_token=1,
                num_shared_experts=0,
                gate="uniform",
            ),
        ]

    def redundancy(self) -> list[RunSettings]:
        """Few latents, few of them active, all tokens: where experts would repeat others."""
        starts = {"narrow": {}, "narrow no k-means": {"initialization": "default"}}
        size = {"num_experts": 64, "experts_per_token": 2}
        runs = []
        for k in (2, 8):
            sae = {"k": k, "d_sae": 8 * self.d_in}
            runs += [
                replace(run, variant=variant, **start)
                for run in (self.softmax_switch(sae), self.run("scale", sae | size))
                for variant, start in starts.items()
            ]
        return [replace(run, training_tokens=self.cache.train_tokens) for run in runs]

    def gates(self) -> list[RunSettings]:
        """Gates: the factors of an expert's activations."""
        gates = ("rescaled", "renormalized", "double_softmax", "softmax", "uniform")
        runs = [self.of_64(32, gate=gate) for gate in gates]
        # With one expert the gate decides what the router learns from, and so the learning
        # rate that suits it.
        switches = (
            ("uniform", "", {}),
            ("softmax", "", {}),
            ("uniform", "router 1/10", {"W_router": 0.1, "b_router": 0.1}),
            ("softmax", "router 1/10", {"W_router": 0.1, "b_router": 0.1}),
            ("uniform", "router 1/50", {"W_router": 0.02, "b_router": 0.02}),
        )
        switch = replace(self.softmax_switch({"k": 32}), **self.ablation_training)
        runs += [
            replace(
                switch, sae={**switch.sae, "gate": gate}, variant=name, lr_factors=lr
            )
            for gate, name, lr in switches
        ]
        return runs


_EXPERIMENTS = (
    _Experiment(
        base="smollm2",
        cache=CacheSettings(other_text="anarchism", unseen_text="debian-handbook"),
        d_in=576,
        ks=(8, 16, 32, 64),
        training={"training_tokens": 1_000_000, "batch_size": 1_024},
        switch_experts_of_equal_flops=18,
        authors={"lr": 1.9e-4, "dead_after_tokens": 200_000},
        ablation_ks=(8, 32),
        ablation_training={"training_tokens": 500_000},
        lengths=(250_000, 500_000, 1_000_000, 2_000_000),
    ),
    _Experiment(
        base="paper",
        cache=CacheSettings(
            model="gpt2",
            text="Skylion007/openwebtext",
            other_text="hle-biomedical",
            train_tokens=40_960_000,
            # The whole text has little more.
            other_tokens=20_000,
            context_size=128,
        ),
        d_in=768,
        ks=(2, 4, 8, 16, 32, 64, 128),
        training={
            "training_tokens": 40_960_000,
            "batch_size": 4_096,
            "dead_after_tokens": 4_000_000,
        },
        switch_experts_of_equal_flops=24,
        authors={"lr": 1.6e-4},
        ablation_ks=(2, 4, 8, 16, 32, 64, 128),
        ablation_training={},
        lengths=(10_240_000, 20_480_000, 40_960_000),
    ),
)

PRESETS: dict[str, Preset] = {
    f"{experiment.base}{suffix}": Preset(
        experiment.base, experiment.cache, tuple(runs()), (0, 1, *more)
    )
    for experiment in _EXPERIMENTS
    # More seeds than 0 and 1 come last.
    for suffix, runs, *more in (
        ("", experiment.main),
        ("-flops", experiment.flops),
        ("-time", experiment.time),
        ("-length", experiment.length),
        ("-experts", experiment.experts),
        ("-scaling", experiment.scaling),
        ("-decompositions", experiment.decompositions),
        ("-gates", experiment.gates),
        ("-recipe", experiment.recipe),
        ("-redundancy", experiment.redundancy),
        ("-defaults", experiment.defaults),
        ("-short-defaults", experiment.short_defaults),
        ("-evidence", experiment.evidence, 2),
    )
}

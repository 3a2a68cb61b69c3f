"""Settings of a training run, and its name."""

import hashlib
import json
from dataclasses import dataclass, field, fields, replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig

from sae_lens_scale.saes.mixture import MixtureSAEConfig

_LABELS = {
    "scale": "Scale",
    "switch": "Switch",
    "topk": "TopK",
    "gated": "Gated",
    "full": "Full TopK",
}
# A TopK SAE by the sparse compute of a mixture, of one expert.
_ONE_EXPERT = {"num_experts": 1, "gate": "uniform", "load_balance_coefficient": 0.0}
# Defaults of the runs are those of version 0.1.0, in which most of them were recorded.
_MIXTURE = {
    "aux_loss_coefficient": 1 / 32,
    "multi_topk_coefficient": 0.0,
    "initialize_from_activations": False,
    "router_lr_factor": 1.0,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "scale": {
        **_MIXTURE,
        "num_experts": 64,
        "experts_per_token": 2,
        "num_shared_experts": 0,
        "gate": "rescaled",
    },
    "switch": {**_MIXTURE, "num_experts": 32, "gate": "softmax"},
}
_ALIASES: dict[str, tuple[str, dict[str, Any]]] = {"full": ("switch", _ONE_EXPERT)}


@dataclass(frozen=True)
class RunSettings:
    """
    Settings of a training run: all that decides its SAE, but for the activations.

    Args:
        architecture: Any that SAELens knows, such as "scale", "switch", "topk" or
            "gated"; or "full", a TopK SAE computed as a Switch SAE with one expert, which
            is equal and, when it is wide, many times as fast.
        sae: Fields of the SAE's training config; d_sae at least. d_in
            comes from the activations, and normalize_activations is
            "expected_average_only_in" unless it is given.
        lr_factors: Factors of the learning rates of some parameters, by
            their names, such as ``{"W_router": 0.1}``.
        lr_scheduler_name: SAELens's name of the schedule.
        lr_warm_up_fraction: Share of the steps in which the learning rate rises.
        lr_decay_fraction: Share of the steps in which it falls to 0.
        lr_end: Last learning rate of cosine schedules; lr / 10 by default.
        batch_size: Tokens per step.
        training_tokens: Tokens to train on, in whole steps; more than are cached
            are read in epochs.
        dead_after_tokens: A latent that has not fired for as many is dead.
        initialization: Start from activations (mixtures with
            ``initialize_from_activations``, other SAEs with b_dec at their geometric median),
            or as SAELens does.
        tokens_per_expert: Tokens for each expert in that initialisation.
        autocast: Train in bfloat16 where torch's autocast does.
        curve_tokens: Held-out tokens of the learning curve; 0 for no curve.
        seed: Seed of the initial weights and of the order of the tokens.
        variant: A name for properties that these settings do not show.
    """

    architecture: str
    sae: dict[str, Any] = field(default_factory=dict)
    lr: float = 1.6e-3
    lr_factors: dict[str, float] = field(default_factory=dict)
    lr_scheduler_name: str = "constant"
    lr_warm_up_fraction: float = 0.05
    lr_decay_fraction: float = 0.2
    lr_end: float | None = None
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    batch_size: int = 2_048
    training_tokens: int = 2_000_000
    dead_after_tokens: int = 200_000
    initialization: Literal["activations", "default"] = "activations"
    tokens_per_expert: int = 200
    autocast: bool = False
    curve_tokens: int = 10_000
    seed: int = 0
    variant: str = ""

    def __post_init__(self) -> None:
        set_types(self)
        kinds = self.sae_fields()
        sae = {n: _typed(n, v, kinds.get(n, Any)) for n, v in self.sae.items()}
        object.__setattr__(self, "sae", sae)
        factors = {
            name: _typed(f"lr_factors[{name!r}]", value, float)
            for name, value in self.lr_factors.items()
        }
        object.__setattr__(self, "lr_factors", factors)
        if self.initialization not in ("activations", "default"):
            raise ValueError(
                "initialization must be 'activations' or 'default', got "
                f"{self.initialization!r}"
            )
        for name in ("batch_size", "dead_after_tokens", "tokens_per_expert"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.curve_tokens < 0:
            raise ValueError(
                f"curve_tokens must be at least 0, got {self.curve_tokens}"
            )
        if self.training_tokens < self.batch_size:
            raise ValueError(
                f"training_tokens must be at least batch_size={self.batch_size}, got "
                f"{self.training_tokens}"
            )
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        shares = (self.lr_warm_up_fraction, self.lr_decay_fraction)
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(
                "lr_warm_up_fraction and lr_decay_fraction must be shares of the steps, "
                f"got {shares[0]} and {shares[1]}"
            )

    @classmethod
    def of_runner(
        cls, cfg: LanguageModelSAERunnerConfig[Any], variant: str
    ) -> "RunSettings":
        """The settings of a run that SAELens's runner would do by a config."""
        steps = cfg.training_tokens // cfg.train_batch_size_tokens
        run = cls(
            cfg.sae.architecture(),
            {"d_sae": cfg.sae.d_sae},
            lr=cfg.lr,
            lr_scheduler_name=cfg.lr_scheduler_name,
            lr_warm_up_fraction=cfg.lr_warm_up_steps / steps,
            lr_decay_fraction=cfg.lr_decay_steps / steps,
            adam_beta1=cfg.adam_beta1,
            adam_beta2=cfg.adam_beta2,
            batch_size=cfg.train_batch_size_tokens,
            training_tokens=cfg.training_tokens,
            dead_after_tokens=cfg.dead_feature_window * cfg.train_batch_size_tokens,
            initialization="default",
            variant=variant,
        )
        # All of its fields: what the package's defaults are may change.
        return replace(run, sae={n: getattr(cfg.sae, n) for n in run.sae_fields()})

    @property
    def steps(self) -> int:
        """Number of training steps."""
        return self.training_tokens // self.batch_size

    def sae_config(self, d_in: int, device: str = "cpu") -> TrainingSAEConfig:
        """
        The SAE's training config, SAELens's of the architecture, for activations ``d_in`` wide.

        Raises:
            ValueError: If a field is not one of the architecture's own.
        """
        cls, defaults, fixed = self._config_class()
        unknown = sorted(set(self.sae) - set(self.sae_fields()))
        if unknown or "d_sae" not in self.sae:
            raise ValueError(
                f"sae must have d_sae and no field that {self.architecture!r} has not, "
                f"got {unknown or sorted(self.sae)}"
            )
        values = {**defaults, **self.sae, **fixed, "d_in": d_in, "device": device}
        return cls(**values)

    def sae_fields(self) -> dict[str, Any]:
        """List the fields that ``sae`` may have, with their types."""
        cls, _, fixed = self._config_class()
        own = {"d_in", "device", "metadata", *fixed}
        names = [f.name for f in fields(cls) if f.init and f.name not in own]
        types = get_type_hints(cls)
        return {name: types[name] for name in names}

    def _config_class(
        self,
    ) -> tuple[type[TrainingSAEConfig], dict[str, Any], dict[str, Any]]:
        """The architecture's config, the laboratory's defaults for it, and what is fixed."""
        name, fixed = _ALIASES.get(self.architecture, (self.architecture, {}))
        try:
            cls = get_sae_training_class(name)[1]
        except KeyError:
            raise ValueError(f"architecture {self.architecture!r} is unknown") from None
        normalize = {"normalize_activations": "expected_average_only_in"}
        return cls, normalize | _DEFAULTS.get(name, {}), fixed

    @property
    def label(self) -> str:
        """Name for people, such as "Scale 64/2"; the same for all k and seeds."""
        cfg = self.sae_config(1_000_000)
        size = str(cfg.d_sae)
        if isinstance(cfg, MixtureSAEConfig) and self.architecture != "full":
            size = str(cfg.num_experts)
            if self.architecture != "switch":
                size += f"/{cfg.experts_per_token}"
        name = _LABELS.get(self.architecture, self.architecture)
        return " ".join(filter(None, (name, size, self.variant)))

    @property
    def name(self) -> str:
        """Name of the run's files: label, k, seed and a hash of all settings."""
        # Fields that repeat a default do not count.
        given = _without_defaults(type(self), vars(self))
        cls, defaults, _ = self._config_class()
        given["sae"] = _without_defaults(cls, self.sae, defaults)
        text = json.dumps(given, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        parts = [self.label.lower()]
        for letter, name in (("k", "k"), ("l", "l1_coefficient")):
            if name in self.sae:
                parts.append(f"{letter}{self.sae[name]}")
        stem = "".join(c if c.isalnum() or c == "." else "-" for c in "-".join(parts))
        return f"{stem}-s{self.seed}-{digest}"


# Types of fields that are checked here, as messages call their values.
_TYPES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: 'an object such as {"name": 0.1}',
    NoneType: "null",
}


def set_types(settings: Any) -> None:
    """
    Convert the numbers of a dataclass, which may be frozen, to the types of its fields, so that
    equal settings have one name; a value of another type than its field is a ValueError.
    """
    for name, kind in get_type_hints(type(settings)).items():
        value = _typed(name, getattr(settings, name), kind)
        object.__setattr__(settings, name, value)


def _typed(name: str, value: Any, kind: Any) -> Any:
    """
    Convert a number to a field's type, however it is written: 1e6 may be an int.

    Raises:
        ValueError: If the value is of none of the field's types.
    """
    union = get_origin(kind) in (Union, UnionType)
    kinds = [get_origin(k) or k for k in (get_args(kind) if union else (kind,))]
    if type(value) in (int, float):
        if float in kinds:
            return float(value)
        if int in kinds and float(value).is_integer():
            return int(value)
    # Names among a few are checked where they are used.
    if set(kinds) <= set(_TYPES) and type(value) not in kinds:
        wanted = " or ".join(_TYPES[k] for k in kinds)
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return value


def _without_defaults(
    cls: Any, values: dict[str, Any], changed: dict[str, Any] | None = None
) -> dict[str, Any]:
    defaults = {f.name: f.default for f in fields(cls)} | (changed or {})
    return {name: value for name, value in values.items() if value != defaults[name]}

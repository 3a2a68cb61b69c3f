"""
Recipes: training settings by the sizes of a run.

docs/defaults.md says what they were measured on.
"""

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, NamedTuple, get_args

from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.registry import get_sae_training_class

from sae_lens_scale.saes.mixture.config import require_choice, require_positive_integer
from sae_lens_scale.saes.scale_sae import default_experts_per_token
from sae_lens_scale.upstream import buffer_argument

Architecture = Literal["scale", "switch"]
RecipeName = Literal["recommended", "paper"]

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
RECIPES: tuple[RecipeName, ...] = get_args(RecipeName)

# SAELens's default.
CONTEXT_SIZE: int = LanguageModelSAERunnerConfig.context_size
# Fewer latents than these are no expert.
_LEAST_SIZE = 32
_SMALL_K, _LARGE_K = 8, 64
# Sizes that may be left to the recipe.
_OPEN = ("train_batch_size_tokens", "num_experts", "experts_per_token")
_LONG_RUN = 500_000
_VERY_LONG_RUN = 10_000_000
# Tokens that SAELens mixes, and that it estimates the activations' norm from.
_MIXED_TOKENS = 65_536
_NORM_TOKENS = 16_384


class Recipe(NamedTuple):
    """
    Settings of a training run.

    Attributes:
        runner: Fields of the runner's config.
        sae: Fields of the SAE's config.
    """

    runner: dict[str, Any]
    sae: dict[str, Any]


def recipe_of(
    name: RecipeName,
    architecture: Architecture,
    *,
    d_sae: int,
    k: int,
    training_tokens: int,
    context_size: int = CONTEXT_SIZE,
    train_batch_size_tokens: int | None = None,
    num_experts: int | None = None,
    experts_per_token: int | None = None,
    prefetch: bool = False,
) -> Recipe:
    """
    Choose the settings of a training run by its sizes.

    Args:
        name: "recommended" (settings that reconstructed well in short runs on
            SmolLM2-135M) or "paper" (those of the architecture's authors, from their code).
        architecture: "scale" or "switch".
        d_sae: Number of latents.
        k: Number of latents kept per token.
        training_tokens: Tokens to train on.
        context_size: Tokens per prompt.
        train_batch_size_tokens: Tokens per training step; None for the recipe's choice.
        num_experts: Number of experts; None for the recipe's choice.
        experts_per_token: Number of experts that each token of a Scale SAE selects, likewise.
        prefetch: Whether a thread is to read the text ahead, with which SAELens's own runner
            cannot go on from a checkpoint.

    Returns:
        The settings; all others keep their defaults.

    Raises:
        ValueError: If a name is unknown, a size is no positive integer, or d_sae cannot be
            divided among experts.
    """
    require_choice("recipe", name, RECIPES)
    require_choice("architecture", architecture, ARCHITECTURES)
    sizes = {
        "d_sae": d_sae,
        "k": k,
        "training_tokens": training_tokens,
        "context_size": context_size,
        "train_batch_size_tokens": train_batch_size_tokens,
        "num_experts": num_experts,
        "experts_per_token": experts_per_token,
    }
    for size, value in sizes.items():
        if value is not None or size not in _OPEN:
            require_positive_integer(size, value)
    batch_size = int(train_batch_size_tokens or _batch_size(name, training_tokens))
    training_tokens, k = int(training_tokens), int(k)
    if training_tokens < batch_size:
        raise ValueError(
            f"training_tokens must be at least the {batch_size} of a training step, got "
            f"{training_tokens}"
        )
    if name == "paper":
        recipe = _paper(architecture, d_sae, training_tokens, batch_size)
    else:
        recipe = _recommended(
            architecture,
            k,
            training_tokens,
            batch_size,
            num_experts or _num_experts(architecture, d_sae, k, experts_per_token),
            experts_per_token,
        )
    # A short run would spend its time on filling a large buffer.
    mixed = max(4 * batch_size, min(_MIXED_TOKENS, training_tokens // 4))
    runner: dict[str, Any] = {
        "train_batch_size_tokens": batch_size,
        # Not of a recipe: SAELens's default mixes 2,560 tokens.
        **buffer_argument(-(-mixed // context_size)),
        "exclude_special_tokens": True,
    }
    if prefetch:
        # So many batches SAELens serves before the language model fills its buffer again.
        runner["prefetch_llm_batches"] = mixed // (2 * batch_size)
    return Recipe(runner | recipe.runner, recipe.sae)


def _batch_size(name: RecipeName, training_tokens: int) -> int:
    if name == "paper":
        return 8_192
    # Small steps are better while there are few.
    return 1_024 if training_tokens < _VERY_LONG_RUN else 4_096


def _recommended(
    architecture: Architecture,
    k: int,
    training_tokens: int,
    batch_size: int,
    num_experts: int,
    experts_per_token: int | None,
) -> Recipe:
    steps = training_tokens // batch_size
    early_decay = architecture == "scale" and training_tokens >= _LONG_RUN
    # Of few active latents each fires rarely, and the dead-latent loss would take living ones.
    soon = architecture == "scale" and k > _SMALL_K
    dead_after_tokens = 8_000 if soon else 20_000
    runner: dict[str, Any] = {
        "lr": 1.6e-3,
        "adam_beta1": 0.8 if k >= _LARGE_K else 0.9,
        "adam_beta2": 0.99,
        "lr_warm_up_steps": steps // 20,
        # Where it was tried, a rate that falls for longer was better, but not in short runs.
        "lr_decay_steps": steps // (2 if early_decay else 5),
        # Rare latents, which learn late, get longer to show themselves in longer runs.
        "dead_feature_window": max(
            1, dead_after_tokens * max(1, training_tokens // 1_000_000) // batch_size
        ),
        "n_batches_for_norm_estimate": max(
            1, min(_NORM_TOKENS, training_tokens // 16) // batch_size
        ),
    }
    sae: dict[str, Any] = {
        "num_experts": num_experts,
        "aux_loss_coefficient": 1 / 4 if soon else 1 / 8,
    }
    if architecture == "scale" and k >= _LARGE_K:
        # By default an eighth.
        e = experts_per_token or default_experts_per_token(num_experts)
        sae["num_shared_experts"] = 3 * e // 8
    return Recipe(runner, sae)


def _num_experts(
    architecture: Architecture, d_sae: int, k: int, experts_per_token: int | None
) -> int:
    """
    Divide the latents: as finely as was measured, but not into experts of a few latents.

    Warns where a d_sae that can be halved less often makes fewer experts than its size would.
    """
    num_experts = 32
    if architecture == "scale":
        num_experts = 512 if k >= _LARGE_K else 256
    most = 0
    while num_experts > 1:
        e = 1
        if architecture == "scale":
            e = experts_per_token or default_experts_per_token(num_experts)
        size, rest = divmod(d_sae, num_experts)
        if size >= _LEAST_SIZE and e * size >= 2 * k:
            most = most or num_experts
            if not rest:
                if num_experts < most:
                    warnings.warn(
                        f"d_sae={d_sae} is divisible into {num_experts} experts, where its "
                        f"size is enough for {most}: choose a multiple of {most}, such as "
                        f"{round(d_sae / most) * most}, or name num_experts",
                        stacklevel=4,
                    )
                return num_experts
        num_experts //= 2
    raise ValueError(
        f"d_sae must be divisible into experts of at least {_LEAST_SIZE} latents, and those "
        f"of a token have to be at least 2 k, got d_sae={d_sae} and k={k}: name num_experts"
    )


def _paper(
    architecture: Architecture, d_sae: int, training_tokens: int, batch_size: int
) -> Recipe:
    """
    Choose the settings of https://github.com/shahinxu/Scale-Sparse-Autoencoder, and of the code
    of Mudide et al. Activations are not normalised: the authors' load-balancing weight suits
    their variance.
    """
    runner: dict[str, Any] = {
        "lr": 2e-4 / (d_sae / 2**14) ** 0.5,
        "lr_decay_steps": training_tokens // batch_size // 5,
        "dead_feature_window": max(1, 10_000_000 // batch_size),
    }
    sae: dict[str, Any] = {
        "normalize_activations": "none",
        "initialize_from_activations": False,
        "router_lr_factor": 1.0,
        "load_balance_coefficient": 3.0,
        "multi_topk_coefficient": 0.0,
    }
    if architecture == "scale":
        sae |= {
            "num_experts": 64,
            "experts_per_token": 2,
            "num_shared_experts": 0,
            "gate": "double_softmax",
            "aux_loss_coefficient": 0.0,
        }
    else:
        sae |= {"num_experts": 32, "gate": "softmax", "aux_loss_coefficient": 1 / 32}
    return Recipe(runner, sae)


def recommended_config(
    architecture: Architecture = "scale",
    *,
    model_name: str,
    hook_name: str,
    d_in: int,
    d_sae: int,
    k: int,
    training_tokens: int,
    dataset_path: str,
    recipe: RecipeName = "recommended",
    sae: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> LanguageModelSAERunnerConfig[Any]:
    """
    Make a config for SAELens's runner by the sizes of the run.

    Measured in runs of up to 2,000,000 tokens on SmolLM2-135M (docs/defaults.md), not in long
    runs or on GPUs. SAELens's defaults stay for the device (the CPU) and for logging (Weights &
    Biases). For all heads of an attention layer (a hook whose name ends in ``_z``) it sets
    ``reshape_activations``, without which the SAE could not be spliced.

    Args:
        architecture: "scale" or "switch".
        model_name: Name of the language model.
        hook_name: Its hook to train on.
        d_in: Width of the activations there, such as ``model.cfg.d_model``.
        d_sae: Number of latents.
        k: Number of latents kept per token.
        training_tokens: Tokens to train on.
        dataset_path: Name or folder of a text dataset.
        recipe: "recommended", or "paper" for the settings of the architecture's authors.
        sae: Other fields of the SAE's config; None leaves numbers of experts to the recipe.
        **overrides: Other fields of the runner's config, such as device, logger and
            output_path; None leaves to the recipe what it chooses.

    Returns:
        The config. For other sizes call again: what depends on them is decided here.

    Raises:
        ValueError: As :func:`recipe_of`, and as the configs.
        TypeError: If a field is given twice, there is no such field, or ``sae`` is no mapping.
    """
    if not isinstance(sae, Mapping | None):
        raise TypeError(
            f"sae must be a mapping of fields of the SAE's config, got {sae!r:.80}"
        )
    sae_fields = {
        name: value
        for name, value in (sae or {}).items()
        if value is not None or name not in _OPEN
    }
    if hook_name.endswith("_z") and overrides.get("hook_head_index") is None:
        sae_fields.setdefault("reshape_activations", "hook_z")
    chosen = recipe_of(
        recipe,
        architecture,
        d_sae=d_sae,
        k=k,
        training_tokens=training_tokens,
        context_size=overrides.get("context_size", CONTEXT_SIZE),
        train_batch_size_tokens=overrides.get("train_batch_size_tokens"),
        num_experts=sae_fields.get("num_experts"),
        experts_per_token=sae_fields.get("experts_per_token"),
    )
    sae_config_class: Any = get_sae_training_class(architecture)[1]
    known = {field.name for field in fields(LanguageModelSAERunnerConfig)}
    if unknown := sorted(set(overrides) - known):
        raise TypeError(
            f"fields of the runner's config have other names than {unknown}; those of the "
            f"SAE's config go into sae, as in sae={{{unknown[0]!r}: ...}}"
        )
    # The SAE lives where the runner puts it.
    where = {n: overrides[n] for n in ("device", "dtype") if n in overrides}
    # None leaves to the recipe what it chooses.
    given = {
        n: v for n, v in overrides.items() if v is not None or n not in chosen.runner
    }
    runner: dict[str, Any] = {
        "model_name": model_name,
        "hook_name": hook_name,
        "training_tokens": int(training_tokens),
        "dataset_path": dataset_path,
        **chosen.runner,
        **given,
    }
    return LanguageModelSAERunnerConfig(
        sae=sae_config_class(
            d_in=d_in, d_sae=d_sae, k=k, **{**where, **chosen.sae, **sae_fields}
        ),
        **runner,
    )

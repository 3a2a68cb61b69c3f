"""Recipes: settings of a training run by its sizes."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE, LanguageModelSAETrainingRunner, LoggingConfig
from sae_lens.config import LanguageModelSAERunnerConfig

from sae_lens_scale import recommended_config
from sae_lens_scale.recipes import ARCHITECTURES, RECIPES, recipe_of

_RUN: dict[str, Any] = {
    "model_name": "gpt2",
    "hook_name": "blocks.8.hook_resid_post",
    "dataset_path": "text",
    "verbose": False,
}
_SIZES: dict[str, Any] = {
    "d_in": 768,
    "d_sae": 24_576,
    "k": 32,
    "training_tokens": 1_000_000,
}


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("k", [1, 8, 64, 200])
@pytest.mark.parametrize("d_sae", [2_048, 4_608, 24_576, 131_072])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_recipe_makes_a_config_of_the_sizes(
    recipe: Any, d_sae: int, k: int, architecture: Any
):
    sizes = {**_SIZES, "d_sae": d_sae, "k": k}
    if recipe == "paper" and k > 2 * d_sae // 64:
        with pytest.raises(ValueError, match="k must be at most"):
            recommended_config(architecture, recipe=recipe, **sizes, **_RUN)
        return
    if recipe == "recommended" and d_sae < 4 * k:
        with pytest.raises(ValueError, match=f"d_sae={d_sae} and k={k}"):
            recommended_config(architecture, recipe=recipe, **sizes, **_RUN)
        return
    cfg = recommended_config(architecture, recipe=recipe, **sizes, **_RUN)
    assert cfg.sae.architecture() == architecture
    assert (cfg.sae.d_in, cfg.sae.d_sae, cfg.sae.k) == (768, d_sae, k)
    if recipe == "recommended":
        assert cfg.sae.expert_size >= 32
        assert cfg.sae.experts_per_token * cfg.sae.expert_size >= 2 * k


@pytest.mark.parametrize("tokens", [1_024, 200_000, 1_000_000, 40_000_000])
def test_the_schedule_fits_the_steps(tokens: int, architecture: Any):
    cfg = recommended_config(
        architecture, **{**_SIZES, "training_tokens": tokens}, **_RUN
    )
    steps = tokens // cfg.train_batch_size_tokens
    assert cfg.lr_warm_up_steps + cfg.lr_decay_steps <= steps
    assert cfg.dead_feature_window >= 1
    assert cfg.n_batches_in_buffer * cfg.context_size >= 4 * cfg.train_batch_size_tokens


@pytest.mark.parametrize(("tokens", "batches"), [(1_000_000, 32), (40_000_000, 8)])
def test_half_of_the_buffer_is_read_ahead_where_a_runner_can_resume_with_it(
    tokens: int, batches: int, architecture: Any
):
    run = {**_RUN, **_SIZES, "training_tokens": tokens}
    cfg = recommended_config(architecture, **run, device="cuda:1")
    assert cfg.prefetch_llm_batches is False
    sizes = {**_SIZES, "training_tokens": tokens}
    sizes.pop("d_in")
    recipe = recipe_of("recommended", architecture, **sizes, prefetch=True)
    assert recipe.runner["prefetch_llm_batches"] == batches
    served = (
        cfg.n_batches_in_buffer * cfg.context_size * cfg.activations_mixing_fraction
    )
    assert served == batches * cfg.train_batch_size_tokens


def test_what_is_given_overrides_the_recipe(architecture: Any):
    sae = {"gate": "softmax", "num_experts": 16}
    cfg = recommended_config(
        architecture, **_SIZES, **_RUN, sae=sae, lr=1.0, context_size=512, device="meta"
    )
    assert (cfg.lr, cfg.context_size) == (1.0, 512)
    assert cfg.device == cfg.sae.device == "meta"
    assert (cfg.sae.gate, cfg.sae.num_experts) == ("softmax", 16)
    mixed = recommended_config(architecture, **_SIZES, **_RUN)
    assert 4 * cfg.n_batches_in_buffer == mixed.n_batches_in_buffer


def test_schedules_are_of_the_steps_that_another_batch_size_makes():
    half = recommended_config(**_SIZES, **_RUN, train_batch_size_tokens=512)
    whole = recommended_config(**_SIZES, **_RUN)
    assert half.lr_decay_steps == pytest.approx(2 * whole.lr_decay_steps, abs=1)
    assert half.dead_feature_window == pytest.approx(
        2 * whole.dead_feature_window, abs=1
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "topk"}, "architecture must be one of .*, got 'topk'"),
        ({"recipe": "best"}, "recipe must be one of .*, got 'best'"),
        ({"k": 0}, "k must be a positive integer, got 0"),
        ({"training_tokens": 1e6}, "training_tokens must be .*, got 1000000.0"),
        ({"training_tokens": 100}, "training_tokens must be at least the 1024 .* 100"),
        ({"d_sae": 1_001}, "d_sae must be divisible .*d_sae=1001"),
        ({"context_size": 0}, "context_size must be a positive integer, got 0"),
        (
            {"train_batch_size_tokens": 0},
            "train_batch_size_tokens must be a positive integer, got 0",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_sizes_that_no_recipe_fits_are_refused_by_name(
    changes: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        recommended_config(**{**_SIZES, **_RUN, **changes})


def test_the_papers_learning_rate_falls_with_the_width():
    rates = {
        d_sae: recipe_of(
            "paper", "scale", d_sae=d_sae, k=32, training_tokens=100_000
        ).runner["lr"]
        for d_sae in (2**14, 2**16)
    }
    assert rates == {2**14: 2e-4, 2**16: 1e-4}


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_config_trains_in_SAELenss_runner_as_it_stands(
    recipe: Any,
    architecture: Any,
    tiny_llama: Path,
    text_folder: Path,
    tmp_path: Path,
):
    cfg = recommended_config(
        architecture,
        recipe=recipe,
        model_name=str(tiny_llama),
        model_class_name="AutoModelForCausalLM",
        hook_name="model.layers.0",
        d_in=32,
        d_sae=4_096,
        k=4,
        training_tokens=4_096,
        train_batch_size_tokens=512,
        dataset_path=str(text_folder),
        context_size=32,
        n_batches_in_buffer=64,
        n_batches_for_norm_estimate=2,
        store_batch_size_prompts=8,
        checkpoint_path=None,
        output_path=str(tmp_path),
        logger=LoggingConfig(log_to_wandb=False),
    )
    assert isinstance(cfg, LanguageModelSAERunnerConfig)
    LanguageModelSAETrainingRunner(cfg).run()
    sae: Any = SAE.load_from_disk(tmp_path)
    assert sae.cfg.architecture() == architecture
    assert sae(torch.randn(3, 32)).isfinite().all()


def test_experts_that_are_given_decide_what_depends_on_them():
    sizes = {**_SIZES, "k": 64}
    few = recommended_config(**sizes, **_RUN, sae={"experts_per_token": 4}).sae
    assert (few.experts_per_token, few.num_shared_experts) == (4, 1)
    assert few.experts_per_token * few.expert_size >= 2 * 64
    given = {"num_experts": 64, "experts_per_token": 8}
    cfg = recommended_config(**sizes, **_RUN, sae=given).sae
    assert (cfg.num_experts, cfg.experts_per_token, cfg.num_shared_experts) == (
        64,
        8,
        3,
    )


@pytest.mark.parametrize(
    ("architecture", "d_sae", "num_experts", "other"),
    [("scale", 9_000, 8, 8_960), ("switch", 6_000, 16, 6_016)],
)
def test_a_d_sae_that_makes_few_experts_warns_and_names_a_better_one(
    architecture: Any, d_sae: int, num_experts: int, other: int
):
    sizes = {**_SIZES, "d_sae": d_sae}
    with pytest.warns(UserWarning, match=f"d_sae={d_sae} .* such as {other}") as caught:
        cfg = recommended_config(architecture, **sizes, **_RUN)
    assert caught[0].filename == __file__
    assert cfg.sae.num_experts == num_experts
    for quiet in (
        {**sizes, "d_sae": other},
        {**sizes, "sae": {"num_experts": num_experts}},
        # Few, but as many as the size is enough for.
        {**sizes, "d_sae": 576},
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            recommended_config(architecture, **quiet, **_RUN)


def test_an_SAE_of_all_heads_joins_them():
    def reshape(hook_name: str, **more: Any) -> str:
        run = {**_RUN, "hook_name": hook_name, **more}
        return recommended_config(**_SIZES, **run).sae.reshape_activations

    assert reshape("blocks.8.attn.hook_z") == "hook_z"
    assert reshape("blocks.8.attn.hook_z", hook_head_index=3) == "none"
    assert reshape("blocks.8.hook_resid_post") == "none"
    kept: dict[str, Any] = {"sae": {"reshape_activations": "none"}}
    assert reshape("blocks.8.attn.hook_z", **kept) == "none"


def test_numbers_of_experts_may_be_left_to_the_recipe_by_None(architecture: Any):
    want = recommended_config(architecture, **_SIZES, **_RUN).sae
    left = {"num_experts": None, "experts_per_token": None}
    assert recommended_config(architecture, **_SIZES, **_RUN, sae=left).sae == want


@pytest.mark.parametrize("sae", ["scale", [("gate", "softmax")], 3])
def test_fields_of_the_SAE_that_are_no_mapping_are_refused(sae: Any):
    with pytest.raises(
        TypeError, match="sae must be a mapping .* got " + re.escape(repr(sae))
    ):
        recommended_config(**_SIZES, **_RUN, sae=sae)


def test_None_leaves_to_the_recipe_what_it_chooses():
    chosen = recommended_config(**_SIZES, **_RUN)
    names = ("lr", "adam_beta1", "train_batch_size_tokens")
    left = recommended_config(**_SIZES, **_RUN, **dict.fromkeys(names))
    assert [getattr(left, n) for n in names] == [getattr(chosen, n) for n in names]


def test_a_field_of_the_SAE_among_the_runners_is_refused_with_its_place():
    with pytest.raises(TypeError, match=r"than \['num_experts'\].* sae=\{'num_exp"):
        recommended_config(**_SIZES, **_RUN, num_experts=16)


def test_a_size_cannot_be_given_twice():
    with pytest.raises(TypeError, match="multiple values for keyword argument 'k'"):
        recommended_config(**_SIZES, **_RUN, sae={"k": 8})


def test_sizes_of_numpy_are_as_good_as_others():
    sizes = {n: np.int64(size) for n, size in _SIZES.items()}
    run = {**_RUN, "checkpoint_path": None}
    want = recommended_config(**_SIZES, **run).to_dict()
    got = recommended_config(**sizes, **run).to_dict()
    assert json.dumps(got) == json.dumps(want)

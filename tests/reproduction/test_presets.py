"""Presets: what their grids hold, and have in common."""

from dataclasses import replace

import pytest

from reproduction.flops import flops_per_token
from reproduction.presets import PRESETS
from sae_lens_scale.saes.mixture import MixtureSAEConfig


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_built(name: str):
    preset = PRESETS[name]
    runs = preset.with_seeds()
    assert (
        len({run.name for run in runs})
        == len(runs)
        == len(preset.seeds) * len(preset.runs)
    )
    assert preset.with_seeds([5])[0].seed == 5
    d_in = 576 if preset.base == "smollm2" else 768
    for run in runs:
        cfg = run.sae_config(d_in)
        assert cfg.d_sae in (d_in, 8 * d_in, 32 * d_in)
        assert run.training_tokens <= preset.cache.train_tokens
    # None trains the same under two names.
    same = [replace(run, variant="") for run in preset.runs]
    assert len({run.name for run in same}) == len(same)


def test_the_paper_preset_is_the_papers():
    preset = PRESETS["paper"]
    cache = preset.cache
    assert (cache.model, cache.hook_name) == ("gpt2", "blocks.8.hook_resid_post")
    assert (cache.text, cache.other_text) == (
        "Skylion007/openwebtext",
        "hle-biomedical",
    )
    mixtures = [run for run in preset.runs if run.architecture in ("scale", "switch")]
    assert {run.sae["d_sae"] for run in mixtures} == {24_576}
    assert {run.sae["k"] for run in mixtures} == {2, 4, 8, 16, 32, 64, 128}


@pytest.mark.parametrize(("name", "d_in"), [("smollm2", 576), ("paper", 768)])
def test_the_main_presets_match_active_latents(name: str, d_in: int):
    active = set()
    labels = set()
    for run in PRESETS[name].runs:
        cfg = run.sae_config(d_in)
        labels.add(run.label)
        if run.architecture == "full":
            continue
        share = 1.0
        if isinstance(cfg, MixtureSAEConfig):
            share = cfg.experts_per_token / cfg.num_experts
        active.add(cfg.d_sae * share)
    assert active == {d_in}
    assert labels == {
        "Scale 64/2",
        "Scale 128/4",
        "Scale 256/8",
        "Scale 256/8 1 shared",
        "Scale 256/8 1 shared early decay",
        "Scale 256/8 1 shared early decay revival",
        "Scale 256/8 1 shared early decay Multi-TopK",
        "Scale 512/16 Multi-TopK",
        "Switch 32",
        "Switch 32 revival",
        "Switch 32 Multi-TopK",
        "Switch 32 Multi-TopK beta 0.8",
        "Switch 32 softmax",
        "Switch 32 softmax Multi-TopK",
        "Switch 32 authors",
        f"TopK {d_in}",
        f"Gated {d_in}",
        f"Full TopK {32 * d_in}",
        f"Full TopK {32 * d_in} Multi-TopK",
    }


@pytest.mark.parametrize(("name", "d_in"), [("smollm2", 576), ("paper", 768)])
def test_the_flops_presets_have_a_Switch_SAE_of_about_equal_FLOPs(name: str, d_in: int):
    scale, narrower, equal = (
        flops_per_token(run.sae_config(d_in)) for run in PRESETS[f"{name}-flops"].runs
    )
    assert narrower.encoder == scale.encoder < equal.encoder
    assert equal.total == pytest.approx(scale.total, rel=0.16)
    assert narrower.total < 0.7 * scale.total


@pytest.mark.parametrize(("base", "num_k"), [("smollm2", 0), ("paper", 7)])
def test_presets_of_one_base_share_runs(base: str, num_k: int):
    main_grid = {run.name for run in PRESETS[base].runs}
    length = PRESETS[f"{base}-length"].runs
    assert len({run.training_tokens for run in length}) == len(length) / 3
    usual = PRESETS[base].runs[0].training_tokens
    names = {run.name for run in length if run.training_tokens == usual}
    assert len(names) == 3 and names <= main_grid
    decompositions = PRESETS[f"{base}-decompositions"]
    assert decompositions.cache == PRESETS[base].cache
    # The mean is the default; smollm2's ablations are shorter.
    assert len({run.name for run in decompositions.runs} & main_grid) == num_k


@pytest.mark.parametrize("base", ["smollm2", "paper"])
@pytest.mark.parametrize("label", ["Scale 256/8 1 shared early decay", "Switch 32"])
def test_revival_looks_after_dead_latents_sooner(base: str, label: str):
    runs = {(run.label, run.sae.get("k")): run for run in PRESETS[base].runs}
    plain, sooner = runs[label, 32], runs[f"{label} revival", 32]
    assert sooner.dead_after_tokens == 0.4 * plain.dead_after_tokens
    weights = [run.sae["aux_loss_coefficient"] for run in (plain, sooner)]
    assert weights == [1 / 8, 1 / 4]


@pytest.mark.parametrize("base", ["smollm2", "paper"])
def test_the_finest_Scale_SAE_shares_more_experts_at_large_k(base: str):
    runs = [r for r in PRESETS[base].runs if r.label == "Scale 512/16 Multi-TopK"]
    topk = [run.sae["k"] for run in PRESETS[base].runs if run.architecture == "topk"]
    assert [run.sae["k"] for run in runs] == topk
    plain = next(r for r in PRESETS[base].runs if r.label == "Scale 256/8 1 shared")
    for run in runs:
        large = run.sae["k"] >= 64
        assert run.sae["num_shared_experts"] == (6 if large else 2)
        assert run.adam_beta1 == (0.8 if large else 0.9)
        # Its label does not say early decay and revival.
        assert run.sae["multi_topk_coefficient"] == 1 / 8
        assert run.sae["aux_loss_coefficient"] == 1 / 4
        assert run.dead_after_tokens == 0.4 * plain.dead_after_tokens
        assert run.lr_decay_fraction == 0.5 and run.lr == plain.lr

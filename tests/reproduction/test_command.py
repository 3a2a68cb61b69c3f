"""``sae-lens-scale experiment``, and the presets that it knows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from experiment_records import write_records
from helpers import small_corpus
from sae_lens import HookedSAETransformer

from reproduction import command as command_module
from reproduction.caching import cache_activations
from reproduction.command import select_runs
from reproduction.flops import flops_per_token
from reproduction.presets import PRESETS
from reproduction.records import read, read_records
from reproduction.settings import RunSettings
from sae_lens_scale.cli import main
from sae_lens_scale.saes.mixture import MixtureSAEConfig

SCALE = RunSettings("scale", {"d_sae": 64, "num_experts": 8, "k": 4})
TOPK = RunSettings("topk", {"d_sae": 16, "k": 4})
GATED = RunSettings("gated", {"d_sae": 16})


def test_a_grid_is_trained_from_the_command_line(
    tiny_model: HookedSAETransformer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    changes = {
        "hook_name": "blocks.0.hook_resid_post",
        "train_tokens": 1_000,
        "test_tokens": 200,
        "other_tokens": 200,
        "context_size": 32,
    }
    text = small_corpus()
    texts: dict[Any, Dataset] = {
        "train": text.select(range(20, 60)),
        "in_domain": text.select(range(20)),
        "other_domain": text.select(range(60, 80)),
    }
    cache = replace(PRESETS["smollm2"].cache, **changes)
    cache_activations(cache, tmp_path / "activations", model=tiny_model, texts=texts)
    command = ["experiment", "run", "--preset", "smollm2", "--folder", str(tmp_path)]
    command += ["--cache", *(f"{name}={value}" for name, value in changes.items())]
    command += ["--only", "topk-576-k8", "--seeds", "0", "3", "--keep_weights"]
    command += ["--set", "training_tokens=640", "batch_size=64", "d_sae=32"]
    command += ["lr=1e-3,2e-3"]
    assert main([*command, "--list"]) == 0
    names = capsys.readouterr().out.split()
    assert not (tmp_path / "runs").exists()
    assert main(command) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:3] == ["label", "k", "settings.lr"]
    assert [line.split()[:4] for line in out[1:]] == [
        ["TopK", "32", "8", "0.001"],
        ["TopK", "32", "8", "0.002"],
    ]
    records = read_records(tmp_path / "runs")
    assert sorted(record.name for record in records) == sorted(names)
    assert {(r.settings["lr"], r.settings["seed"]) for r in records} == {
        (1e-3, 0),
        (1e-3, 3),
        (2e-3, 0),
        (2e-3, 3),
    }
    assert min(read(tmp_path / "runs")["mse_other_domain"].tolist()) > 0
    assert all((tmp_path / "runs" / name / "cfg.json").exists() for name in names)
    # What is there already is found, and nothing is cached or trained.
    step = ["--preset", "smollm2", "--folder", str(tmp_path), *command[6:12]]
    assert main(["experiment", "cache", *step]) == 0
    lines = capsys.readouterr().out.splitlines()
    hashes = (records[0].cache or {})["texts"]
    assert lines == [
        str(tmp_path / "activations"),
        *(
            f"{split}: {hashes[split]}"
            for split in ("train", "in_domain", "other_domain")
        ),
    ]


def test_evaluate_says_what_has_no_weights(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    write_records(tmp_path / "runs", "smollm2-time", seeds=(0,))
    (first, *_) = records = read_records(tmp_path / "runs")
    del first.measures["loss_recovered"]
    first.write(tmp_path / "runs")
    monkeypatch.setattr(
        command_module, "evaluate_records", lambda *_, **__: records[1:]
    )
    command = ["experiment", "evaluate", "--preset", "smollm2", "--contexts", "16"]
    assert main([*command, "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out == (
        f"{len(records) - 1} records in {tmp_path / 'runs'} were evaluated, 1 could not "
        "be: experiment run --keep_weights\n"
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("run --folder nowhere", "nowhere/activations/train holds no activations"),
        ("run --only nonsense", "no run's name contains 'nonsense': scale-64-2-k8-s0"),
        ("run --set nonsense=1", "'nonsense' is neither a setting nor a field"),
        ("run --set lr", "a change must be NAME=VALUE, got 'lr'"),
        ("run --cache nonsense=1", "--cache must set one of context_size, hook_name"),
        ("run --set lr=1e-3 lr=2e-3", "lr must be set once, its values separated by"),
        (
            "run --set training_tokens=1.5",
            "training_tokens must be a whole number, got",
        ),
        ("run --set lr=high", "lr must be a number, got 'high'"),
        ("run --set k=8.5", "k must be a whole number, got 8.5"),
        ("cache --cache train_tokens=1e-3", "train_tokens must be a whole number, got"),
        ("run --workers 0", "--workers must be positive, got 0"),
        ("cache --cache train_tokens=0", "train_tokens must be positive, got 0"),
        ("evaluate --folder nowhere", "nowhere/runs is no folder"),
    ],
)
def test_errors_are_one_line(
    command: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    step, *options = command.split()
    assert main(["experiment", step, "--preset", "smollm2", *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.startswith("sae-lens-scale: error: ")
    assert captured.err.count("\n") == 1


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]):
    for command in ([], ["run"], ["run", "--preset", "nonsense"]):
        with pytest.raises(SystemExit) as stop:
            main(["experiment", *command])
        assert stop.value.code == 2
        assert "usage: sae-lens-scale experiment" in capsys.readouterr().err


def test_changes_reach_settings_and_fields_of_SAEs():
    runs = select_runs([SCALE, TOPK, GATED], ["lr=1e-3", "k=2,8", "gate=softmax"])
    assert all(run.lr == 1e-3 for run in runs)
    assert [(run.architecture, run.sae.get("k")) for run in runs] == [
        ("scale", 2),
        ("scale", 8),
        ("topk", 2),
        ("topk", 8),
        ("gated", None),
    ]
    assert [run.sae.get("gate") for run in runs] == ["softmax"] * 2 + [None] * 3
    (run,) = select_runs([SCALE], ['lr_factors={"omega": 2, "W_router": 0.1}'])
    assert run.lr_factors == {"omega": 2, "W_router": 0.1}
    # However a number is written, it is the same run.
    short, long = (
        select_runs(
            [SCALE],
            [f"training_tokens={tokens}", f"k={k}", f"lr={lr}", f"lr_end={lr}"],
        )
        for tokens, k, lr in (("1e6", "2.0", "1"), ("1000000", "2", "1.0"))
    )
    assert short == long
    assert short[0].name == long[0].name
    # Runs that become the same are one.
    other = replace(SCALE, lr=1e-3)
    assert len(select_runs([SCALE, other], ["lr=1e-4"])) == 1
    assert select_runs([SCALE, TOPK, GATED], only="k4-s0") == [SCALE, TOPK]
    assert select_runs([SCALE, TOPK], only="scale*k4") == [SCALE]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_built(name: str):
    preset = PRESETS[name]
    runs = preset.with_seeds()
    assert len({run.name for run in runs}) == len(runs) == 2 * len(preset.runs)
    assert preset.with_seeds([5])[0].seed == 5
    d_in = 576 if preset.base == "smollm2" else 768
    for run in runs:
        cfg = run.sae_config(d_in)
        assert cfg.d_sae in (d_in, 8 * d_in, 32 * d_in)
        assert run.training_tokens <= preset.cache.train_tokens


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


@pytest.mark.parametrize("base", ["smollm2", "paper"])
def test_presets_of_one_base_share_runs(base: str):
    main_grid = {run.name for run in PRESETS[base].runs}
    length = PRESETS[f"{base}-length"].runs
    assert len({run.training_tokens for run in length}) == len(length) / 3
    usual = PRESETS[base].runs[0].training_tokens
    names = {run.name for run in length if run.training_tokens == usual}
    assert len(names) == 3 and names <= main_grid


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
    shared = {run.sae["k"]: run.sae["num_shared_experts"] for run in runs}
    assert len(shared) == len(runs) and set(shared) == {
        run.sae["k"] for run in PRESETS[base].runs if run.architecture == "topk"
    }
    assert all(n == (6 if k >= 64 else 2) for k, n in shared.items())
    betas = {run.sae["k"]: run.adam_beta1 for run in runs}
    assert all(beta == (0.8 if k >= 64 else 0.9) for k, beta in betas.items())
    # What its label does not say: early decay and revival.
    plain = next(r for r in PRESETS[base].runs if r.label == "Scale 256/8 1 shared")
    for run in runs:
        assert run.sae["multi_topk_coefficient"] == 1 / 8
        assert run.sae["aux_loss_coefficient"] == 1 / 4
        assert run.dead_after_tokens == 0.4 * plain.dead_after_tokens
        assert run.lr_decay_fraction == 0.5 and run.lr == plain.lr


def test_no_preset_trains_the_same_under_two_names():
    for preset in PRESETS.values():
        same = [replace(run, variant="") for run in preset.runs]
        assert len({run.name for run in same}) == len(same)


def test_presets_of_one_base_share_their_common_runs():
    main_grid, experts = PRESETS["paper"], PRESETS["paper-experts"]
    assert main_grid.cache == experts.cache
    decompositions = {run.name for run in PRESETS["paper-decompositions"].runs}
    shared = {run.name for run in main_grid.runs} & decompositions
    # The mean is the default.
    assert len(shared) == 7

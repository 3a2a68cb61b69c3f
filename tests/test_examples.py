"""The examples that need no model hub, run at a tiny size; the demo's results."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from analysis.page.reading import read
from sae_lens import HookedSAETransformer
from sae_lens.saes.sae import SAE

from examples import train_scale_smollm2
from examples.train_scale_smollm2 import (
    DemoConfig,
    require_sentence,
    run_demo,
    runner_configs,
)
from sae_lens_scale.cli import main
from sae_lens_scale.loading.smollm2 import HUB_NAME

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, arguments: str) -> None:
    with mock.patch.object(sys, "argv", [name, *arguments.split()]):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


DEMO_ARGUMENTS = (
    "--training_tokens 2048 --batch_size 128 --expansion 2 --num_experts 8 "
    "--k 16 --context_size 32 --eval_batches 1 --prompts_per_batch 8 "
    "--explorer_tokens 512"
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a tiny demo, run as `make demo` runs it."""
    output = tmp_path_factory.mktemp("demo")
    run("train_scale_smollm2.py", f"{DEMO_ARGUMENTS} --output {output}")
    return output


def test_demo_leaves_SAEs_metrics_and_picture(demo: Path):
    assert sorted(path.name for path in demo.iterdir()) == [
        "explorer.html",
        "metrics.json",
        "scale",
        "switch",
        "tokens.json",
        "tokens.png",
        "topk",
    ]
    for name in ("scale", "switch", "topk"):
        cfg = SAE.load_from_disk(demo / name).cfg
        assert cfg.architecture() == name
        # As others know the model.
        assert cfg.metadata.model_name == HUB_NAME
    # Matched in active latents per token.
    assert SAE.load_from_disk(demo / "topk").cfg.d_sae == 2 * 1_152 // 8
    saes = json.loads((demo / "metrics.json").read_text())["saes"]
    for name, metrics in saes.items():
        assert metrics["ce_loss_without_sae"] < metrics["ce_loss_with_ablation"]
        assert 0 < metrics["l0"] <= 16
        assert 0 <= metrics["silent_latents"] <= 1
        assert ("idle_experts" in metrics) == (name != "topk")
    tokens = json.loads((demo / "tokens.json").read_text())
    assert "".join(t["token"] for t in tokens) == DemoConfig().sentence
    assert (demo / "tokens.png").read_bytes().startswith(b"\x89PNG")
    facts, arrays = read((demo / "explorer.html").read_text(encoding="utf-8"))
    assert facts["num_experts"] == 8
    assert facts["num_prompts"] == 1
    assert arrays["lengths"].tolist()[1:] == [32] * 16


def test_the_command_line_evaluates_what_the_demo_leaves(
    demo: Path, capsys: pytest.CaptureFixture[str]
):
    command = f"evaluate {demo / 'scale'} --n_eval_reconstruction_batches 1 --json"
    command += " --n_eval_sparsity_variance_batches 1 --batch_size_prompts 4"
    assert main(command.split()) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert 0 < metrics["sparsity"]["l0"] <= 16
    assert 0 < metrics["model_performance_preservation"]["ce_loss_score"] < 1


def test_splice_and_steer(demo: Path, capsys: pytest.CaptureFixture[str]):
    run("splice_and_steer.py", f"--sae {demo / 'scale'} --new_tokens 3")
    out = capsys.readouterr().out
    assert "strongest latent" in out
    change = float(out.split("by splicing: ")[1].split()[0])
    steering = float(out.split("by steering: ")[1].split()[0])
    assert change < 1e-2 < steering


def test_architecture_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = f"--training_tokens 4096 --output {tmp_path / 'sae'}"
    run("architecture_by_name.py", arguments)
    out = capsys.readouterr().out
    assert f"trained ScaleTrainingSAE into {tmp_path / 'sae'}" in out
    assert "--k 8: ScaleTrainingSAEConfig" in out
    assert SAE.load_from_disk(tmp_path / "sae").cfg.architecture() == "scale"


def test_train_scale_gpt2_has_the_papers_settings():
    # Running it needs a model hub; its settings must at least be valid.
    settings = runpy.run_path(str(EXAMPLES / "train_scale_gpt2.py"))["settings"]
    sae = settings.sae
    assert (sae.d_in, sae.d_sae) == (768, 24_576)
    assert (sae.num_experts, sae.experts_per_token, sae.k) == (64, 2, 32)
    assert (sae.gate, sae.num_shared_experts) == ("double_softmax", 0)
    steps = settings.training_tokens // settings.train_batch_size_tokens
    assert steps == 10_000
    assert settings.hook_name == "blocks.8.hook_resid_post"
    # SAELens finds this out only when training starts.
    buffer = settings.n_batches_in_buffer * settings.context_size
    assert buffer >= settings.train_batch_size_tokens


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("training_tokens", 0),
        ("eval_batches", -1),
        ("batch_size", 10**9),
        ("expansion", 0),
        ("k", 0),
        ("prompts_per_batch", 0),
        ("num_experts", 0),
        ("experts_per_token", -2),
        ("lr", float("nan")),
        ("lr", 0.0),
    ],
)
def test_DemoConfig_refuses_what_cannot_run(name: str, value: float):
    with pytest.raises(ValueError, match=f"must be .*{value}|must be .*batch_size"):
        DemoConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["model", "dataset", "hook_name", "sentence"])
def test_DemoConfig_refuses_names_and_sentences_that_are_empty(name: str):
    with pytest.raises(ValueError, match=f"^{name} must not be empty$"):
        DemoConfig(**{name: ""})  # type: ignore[arg-type]


def test_wrong_settings_end_the_demo_in_one_line(tmp_path: Path):
    for arguments, message in (
        ("--prompts_per_batch 0", "prompts_per_batch must be positive, got 0"),
        ("--device meta", "device 'meta' cannot be used"),
        (f"--output {__file__}", f"output: {__file__} is no folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            run("train_scale_smollm2.py", f"--output {tmp_path / 'new'} {arguments}")
        assert str(stop.value).startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_a_sentence_is_read_whole_and_is_not_too_long_for_a_picture(
    tiny_model: HookedSAETransformer,
):
    for sentence in ("so $$ x $$", " ", "word " * 60):
        require_sentence(sentence, tiny_model)
    # The model takes 128 tokens, the BOS included.
    with pytest.raises(ValueError, match="sentence must have 1 to 127 tokens, got 3"):
        require_sentence("word " * 300, tiny_model)
    with pytest.raises(ValueError, match="sentence must be Unicode text, got"):
        require_sentence("\udcff", tiny_model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sentence": "word " * 300}, "sentence must have 1 to 200 tokens, got 3"),
        (
            {"hook_name": "blocks.99.hook_resid_post"},
            f"{HUB_NAME} has no hook 'blocks.99",
        ),
        (
            {"hook_name": "blocks.0.mlp.hook_post"},
            "the SAE must be as wide as the model at .* got 576",
        ),
        ({"context_size": 2_049}, "context_size must be at most the 2048 tokens"),
        ({"num_experts": 7}, "d_sae must be divisible by num_experts"),
        ({"dataset": "{folder}/no"}, "dataset {folder}/no cannot be loaded"),
        # Of these, the first is held out.
        ({"dataset": "{folder}"}, "dataset {folder}, held out, must hold a prompt of"),
    ],
)
def test_the_demo_looks_at_everything_before_it_trains(
    settings: dict[str, Any],
    message: str,
    smollm2: HookedSAETransformer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_text("short")
    for name in ("1.txt", "2.txt"):
        (folder / "b" / name).write_text(f"long {name} " * 1_000)
    settings = {"dataset": "{folder}/b", **settings}
    settings = {
        name: value.format(folder=folder) if isinstance(value, str) else value
        for name, value in settings.items()
    }
    train = mock.Mock()
    monkeypatch.setattr(train_scale_smollm2, "load_language_model", lambda *_: smollm2)
    monkeypatch.setattr(train_scale_smollm2, "train_sae", train)
    with pytest.raises(ValueError, match=f"^{message.format(folder=folder)}"):
        run_demo(DemoConfig(output=tmp_path / "new", **settings))
    assert not train.called


def test_demo_trains_each_architecture_by_its_recipe(demo: Path):
    cfg = DemoConfig(batch_size=1_000)
    runners = runner_configs(cfg, 576)
    assert {n: r.lr for n, r in runners.items()} == {
        "scale": 1.6e-3,
        "switch": 1.6e-3,
        "topk": 3.2e-3,
    }
    windows = {n: r.dead_feature_window for n, r in runners.items()}
    assert windows == {"scale": 8, "switch": 20, "topk": 200}
    assert runners["scale"].sae.num_experts == 256
    chosen = runner_configs(replace(cfg, lr=1e-4, num_experts=64), 576)
    assert {r.lr for r in chosen.values()} == {1e-4}
    assert chosen["scale"].sae.experts_per_token == 2
    settings = json.loads((demo / "scale" / "demo.json").read_text())["settings"]
    assert json.loads(settings)["sae"]["initialize_from_activations"]


@pytest.mark.parametrize("sizes", [(None, None), (64, 2), (64, 4), (8, 2)])
def test_a_token_pays_for_as_many_latents_in_all_SAEs_of_the_demo(sizes: Any):
    cfg = DemoConfig(num_experts=sizes[0], experts_per_token=sizes[1])
    saes: Any = {n: r.sae for n, r in runner_configs(cfg, 576).items()}
    paid = {
        n: saes[n].experts_per_token * saes[n].expert_size for n in ("scale", "switch")
    }
    assert set(paid.values()) == {saes["topk"].d_sae}


def test_demo_does_not_train_again_what_it_has(
    demo: Path, capsys: pytest.CaptureFixture[str]
):
    weights = demo / "scale" / "sae_weights.safetensors"
    before = weights.stat().st_mtime_ns
    arguments = f"{DEMO_ARGUMENTS} --output {demo} --sentence Hello"
    run("train_scale_smollm2.py", arguments)
    assert "Training" not in capsys.readouterr().out
    assert weights.stat().st_mtime_ns == before
    tokens = json.loads((demo / "tokens.json").read_text())
    assert [t["token"] for t in tokens] == ["Hello"]

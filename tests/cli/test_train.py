"""``sae-lens-scale train`` on a language model in a folder."""

import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from cli.runs import Run, checkpoint_of, train_command
from helpers import scale_sae, small_corpus
from sae_lens import HookedSAETransformer
from sae_lens.saes.sae import SAE

from sae_lens_scale import recommended_config, runner
from sae_lens_scale.cli import train
from sae_lens_scale.loading.smollm2 import HUB_NAME
from sae_lens_scale.run_settings import SIZES


def test_train_is_SAELenss_runner_with_our_architectures(trained: Path):
    sae = SAE.load_from_disk(trained / "sae")
    assert trained.name.startswith(sae.cfg.architecture())
    assert (sae.cfg.num_experts, sae.cfg.k) == (4, 8)  # type: ignore[attr-defined]
    assert sae.cfg.normalize_activations == "none"
    assert checkpoint_of(trained).joinpath("trainer_state.pt").exists()


def test_train_gives_parameters_learning_rates_of_their_own(trained: Path):
    # It starts at 0, and training would change it.
    sae = SAE.load_from_disk(trained / "sae")
    assert not sae.get_parameter("b_enc").any()


def test_train_starts_from_activations(trained: Path):
    # It starts at 0 otherwise, and would have moved by far less.
    sae = SAE.load_from_disk(trained / "sae")
    router, decoder = sae.get_parameter("b_router"), sae.get_parameter("b_dec")
    assert torch.cosine_similarity(router, decoder, dim=0) > 0.8


def test_lr_factors_of_several_options_add_up(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    runner = MagicMock()
    monkeypatch.setattr(train, "InterruptibleTrainingRunner", runner)
    factors = "--lr_factors omega=2 --lr_factors W_enc=1 b_enc=0"
    run(f"train --architecture scale {factors}")
    want = {"omega": 2.0, "W_enc": 1.0, "b_enc": 0.0}
    assert runner.call_args.kwargs["lr_factors"] == want


def test_train_help_explains_our_fields(run: Run):
    out = " ".join(run("train --architecture scale --help").out.split())
    assert "Number of experts (N); divides d_sae." in out
    assert "Weight alpha of the load-balancing loss." in out
    assert "--training_tokens" in out
    assert "--lr_factors NAME=FACTOR" in out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--output_path {file}", "output_path: {file} is no folder"),
        ("--checkpoint_path {file}/x", "checkpoint_path: {file} is no folder"),
        ("--store_batch_size_prompts 0", "store_batch_size_prompts must be positive"),
        ("--n_batches_in_buffer 7", "must be so many contexts of 32 tokens that they"),
        ("--lr 0", "lr must be positive and finite, got 0.0"),
        ("--lr_scheduler_name cosin", "lr_scheduler_name='cosin'"),
        ("--device meta", "device 'meta' cannot be used"),
        (
            "--resume_from_checkpoint {file}-no",
            "resume_from_checkpoint: there is no {file}-no/runner_cfg.json",
        ),
    ],
)
def test_train_refuses_what_would_cost_the_result(
    option: str, message: str, tmp_path: Path, run: Run
):
    file = tmp_path / "file"
    file.touch()
    # Neither model nor data set exists: these are looked at first.
    command = train_command("scale", tmp_path / "a", tmp_path / "b", tmp_path)
    captured = run(f"{command} {option}".format(file=file), 1)
    assert message.format(file=file) in captured.err


def test_train_names_the_model_or_the_text_that_cannot_be_loaded(
    tiny_llama: Path, tmp_path: Path, run: Run
):
    nothing = tmp_path / "nothing"
    for model, setting in ((nothing, "model_name"), (tiny_llama, "dataset_path")):
        err = run(train_command("scale", model, nothing, tmp_path), 1).err
        message = f"error: {setting} {nothing} cannot be loaded: "
        assert message in err.splitlines()[-1]


def test_train_names_a_hook_that_a_hugging_face_model_lacks(
    tiny_llama: Path, tmp_path: Path, run: Run
):
    command = train_command("scale", tiny_llama, tmp_path, tmp_path)
    err = run(f"{command} --hook_name model.layers.9", 1).err
    message = f"hook_name must be a module of {tiny_llama}, got 'model.layers.9'"
    assert err.splitlines()[-1].endswith(f"error: {message}")


def test_train_says_what_it_will_take_before_it_begins(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(train, "InterruptibleTrainingRunner", MagicMock())
    options = "--d_in 768 --d_sae 24576 --k 32 --training_tokens 1000000"
    err = run(f"train --architecture scale {options}").err
    assert "training on 1,000,000 tokens in 977 steps of 1,024: 24,576 latents" in err
    # Encoder and decoder, each four times, in float32.
    experts = "in 256 experts, 8 per token (1 shared), about 0.60 GB"
    assert experts in err
    err = run(f"train --architecture topk {options}").err
    assert "in 245 steps of 4,096: 24,576 latents, about 0.60 GB" in err


def test_an_interrupted_training_leaves_a_checkpoint_and_status_130(
    tiny_llama: Path, text_folder: Path, tmp_path: Path, run: Run
):
    command = train_command("scale", tiny_llama, text_folder, tmp_path, tokens=10**8)
    # A schedule without an end, so that the run may be shorter when it goes on.
    command = f"{command} --recipe none"
    command = [sys.executable, "-m", "sae_lens_scale", *command.split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "mse_loss" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in rest
    checkpoint = next(tmp_path.glob("checkpoints/*/*"))
    message = f"error: interrupted; resume_from_checkpoint {checkpoint} goes on"
    assert f"sae-lens-scale: {message}" in rest

    before = SAE.load_from_disk(checkpoint)
    seen = int(checkpoint.name)
    again = train_command("scale", tiny_llama, text_folder, tmp_path, seen + 512)
    # The checkpoint has the factors.
    again = f"{again.partition('--lr_factors')[0]} --recipe none"
    again += f" --resume_from_checkpoint {checkpoint}"
    err = run(f"{again} --lr 1e-3", 1).err
    assert f"error: lr must be 0.002, as in {checkpoint}, whose run goes on" in err
    err = run(again).err
    assert f"next: sae-lens-scale evaluate {tmp_path / 'sae'}\n" in err
    after = SAE.load_from_disk(tmp_path / "sae")
    assert not after.get_parameter("b_enc").any()
    assert after.cfg.architecture() == before.cfg.architecture()
    assert not torch.equal(after.W_enc, before.W_enc)


def test_the_recipe_of_the_command_is_that_of_recommended_config(run: Run):
    sizes = "--d_in 64 --d_sae 8192 --k 64 --training_tokens 600000"
    command = f"--architecture scale {sizes} --lr 1e-4 --experts_per_token 4"
    cfg = train.with_recipe(None, command.split())
    want = recommended_config(
        d_in=64,
        d_sae=8192,
        k=64,
        training_tokens=600_000,
        model_name=cfg.model_name,
        hook_name=cfg.hook_name,
        dataset_path=cfg.dataset_path,
        lr=1e-4,
        sae={"experts_per_token": 4},
    )
    assert cfg.sae == want.sae
    for name in ("lr", "adam_beta1", "lr_decay_steps", "n_batches_in_buffer"):
        assert getattr(cfg, name) == getattr(want, name)
    on_gpu = train.with_recipe(None, [*command.split(), "--device", "cuda"])
    assert on_gpu.prefetch_llm_batches == 32


def test_train_says_what_the_recipe_chose_and_what_was_given(
    capsys: pytest.CaptureFixture[str],
):
    command = "--architecture switch --d_in 64 --d_sae 8192 --k 8 --lr 1e-4"
    train.with_recipe("paper", command.split())
    err = capsys.readouterr().err
    assert "recipe paper for switch" in err
    assert "lr 0.0001 (given; the recipe's is 0.00028" in err
    assert "gate softmax\n" in err
    command = "--architecture scale --d_in 64 --d_sae 9000 --k 8"
    train.with_recipe(None, command.split())
    err = capsys.readouterr().err
    assert "sae-lens-scale: d_sae=9000 is divisible into 8 experts" in err
    assert "UserWarning" not in err


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("paper", "--architecture topk", "fresh SAEs of .* got topk"),
        ("recommended", "--from_pretrained_path x", "fresh SAEs of .* got x"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(
    recipe: str | None, options: str, message: str
):
    with pytest.raises(ValueError, match=message):
        train.with_recipe(recipe, f"--d_sae 8192 --k 8 {options}".split())


def test_sizes_of_an_SAE_that_is_loaded_are_its_own(tmp_path: Path):
    sae = scale_sae(experts_per_token=3)
    sae.save_model(tmp_path)
    pretrained = ["--from_pretrained_path", str(tmp_path)]
    # The runner refuses what is given otherwise.
    cfg = train.with_recipe(None, [*pretrained, "--k", "3"])
    saved, got = sae.cfg.to_dict(), cfg.sae.to_dict()
    assert {n: got[n] for n in SIZES} == {n: saved[n] for n in SIZES} | {"k": 3}
    cfg = train.with_recipe("none", [*pretrained, "--architecture", "topk"])
    assert cfg.sae.architecture() == "topk"


def test_None_is_no_folder():
    folders = ["--output_path", "None", "--checkpoint_path", "None"]
    cfg = train.with_recipe("none", folders)
    assert (cfg.output_path, cfg.checkpoint_path) == (None, None)


@pytest.mark.parametrize("options", ["", "--architecture topk"])
def test_recipe_none_leaves_SAELenss_defaults(options: str):
    cfg = train.with_recipe("none", f"{options} --lr 1e-4".split())
    assert (cfg.train_batch_size_tokens, cfg.adam_beta2) == (4096, 0.999)


def test_options_are_read_as_SAELenss_parser_reads_them():
    sizes = "--d_in 64 --d_sae 8192 --k 64"
    want = train.with_recipe(
        "paper", f"--architecture scale {sizes} --training_tokens 600000".split()
    )
    got = train.with_recipe(
        "paper", f"--sae scale {sizes} --training_tok 600000".split()
    )
    assert got.sae == want.sae
    assert (got.lr, got.training_tokens) == (want.lr, want.training_tokens)


def test_an_abbreviated_architecture_does_not_train_SAELenss_default():
    with pytest.raises(ValueError, match="write --architecture topk in full"):
        train.with_recipe(None, ["--arch", "topk"])


@pytest.mark.parametrize("name", ["smollm2", HUB_NAME])
def test_train_takes_the_model_and_the_text_that_need_no_hub(
    name: str,
    tiny_model: HookedSAETransformer,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
):
    load = MagicMock(return_value=tiny_model)
    monkeypatch.setattr(runner, "load_smollm2", load)
    monkeypatch.setattr(runner, "docstring_corpus", lambda split: small_corpus())
    command = train_command("scale", Path(name), Path("docstrings"), tmp_path, 512)
    command = command.replace("AutoModelForCausalLM", "HookedTransformer")
    command += " --hook_name blocks.0.hook_resid_post"
    assert "device 'meta' cannot be used" in run(f"{command} --device meta", 1).err
    assert not load.called
    run(command)
    metadata = SAE.load_from_disk(tmp_path / "sae").cfg.metadata
    assert (metadata.model_name, metadata.dataset_path) == (name, "docstrings")

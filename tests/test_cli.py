"""The command line, from training to conversion, on a language model in a folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import SAE

from sae_lens_scale import ScaleTrainingSAE, ScaleTrainingSAEConfig
from sae_lens_scale.cli import main, train
from sae_lens_scale.loading.formats import FORMATS

SAE_OPTIONS = (
    "--d_in 32 --d_sae 128 --num_experts 4 --k 8 "
    "--normalize_activations expected_average_only_in"
)


def train_command(
    architecture: str, model: Path, text: Path, output: Path, tokens: int = 12_288
) -> list[str]:
    command = (
        f"train --architecture {architecture} {SAE_OPTIONS} "
        f"--model_class_name AutoModelForCausalLM --model_name {model} "
        f"--hook_name model.layers.0 --dataset_path {text} --is_dataset_tokenized false "
        "--context_size 32 --store_batch_size_prompts 8 --train_batch_size_tokens 256 "
        "--n_batches_in_buffer 32 --n_batches_for_norm_estimate 2 --lr 2e-3 "
        f"--training_tokens {tokens} --n_checkpoints 1 --exclude_special_tokens true "
        f"--checkpoint_path {output / 'checkpoints'} --output_path {output / 'sae'} "
        "--log_to_wandb false --lr_factors b_router=0 W_router=0.5"
    )
    return command.split()


@pytest.fixture(scope="module", params=["scale", "switch"])
def trained(
    request: pytest.FixtureRequest,
    tiny_llama: Path,
    text_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Folder of the results of ``train``: ``sae`` and ``checkpoints``."""
    output = tmp_path_factory.mktemp(request.param)
    assert main(train_command(request.param, tiny_llama, text_folder, output)) == 0
    return output


def checkpoint_of(trained: Path) -> Path:
    return next(trained.glob("checkpoints/*/*"))


def test_train_is_SAELenss_runner_with_our_architectures(trained: Path):
    sae = SAE.load_from_disk(trained / "sae")
    assert trained.name.startswith(sae.cfg.architecture())
    assert (sae.cfg.num_experts, sae.cfg.k) == (4, 8)  # type: ignore[attr-defined]
    assert sae.cfg.normalize_activations == "none"
    assert checkpoint_of(trained).joinpath("trainer_state.pt").exists()


def test_train_gives_parameters_learning_rates_of_their_own(trained: Path):
    # Both start at 0.
    sae = SAE.load_from_disk(trained / "sae")
    assert not sae.get_parameter("b_router").any()
    assert sae.get_parameter("b_dec").any()


def test_lr_factors_of_several_options_add_up(monkeypatch: pytest.MonkeyPatch):
    given: dict[str, Any] = {}

    class Runner:
        def __init__(self, _: Any, **options: Any):
            given.update(options)

        def run(self) -> None:
            pass

    monkeypatch.setattr(train, "InterruptibleTrainingRunner", Runner)
    factors = "--architecture scale --lr_factors omega=2 --lr_factors W_enc=1 b_enc=0"
    assert main(["train", *factors.split()]) == 0
    assert given["lr_factors"] == {"omega": 2.0, "W_enc": 1.0, "b_enc": 0.0}


@pytest.mark.parametrize("factor", ["W_router", "W_router=", "W_router=fast"])
def test_train_refuses_lr_factors_that_are_none(
    factor: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--lr_factors", factor])
    assert stop.value.code == 2
    assert f"must be NAME=FACTOR, such as W_router=0.1, got '{factor}'" in (
        capsys.readouterr().err
    )


def test_train_help_explains_our_fields(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--architecture", "scale", "--help"])
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Number of experts (N); divides d_sae." in out
    assert "Weight alpha of the load-balancing loss." in out
    assert "--training_tokens" in out
    assert "--lr_factors NAME=FACTOR" in out


def evaluate_json(
    sae: Path, capsys: pytest.CaptureFixture[str], *options: str
) -> dict[str, dict[str, float]]:
    command = f"evaluate {sae} --n_eval_reconstruction_batches 2 --json"
    command += " --n_eval_sparsity_variance_batches 2 --batch_size_prompts 4"
    capsys.readouterr()
    assert main([*command.split(), *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_evaluate_needs_nothing_but_the_folder(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    output = tmp_path / "metrics.json"
    metrics = evaluate_json(trained / "sae", capsys, "--output", str(output))
    assert 0 < metrics["sparsity"]["l0"] <= 8
    assert 0.2 < metrics["reconstruction_quality"]["explained_variance"] < 1
    assert metrics["token_stats"]["total_tokens_eval_reconstruction"] == 2 * 4 * 32
    written = json.loads(output.read_text())
    assert written["metrics"] == metrics
    assert len(written["feature_metrics"]["feature_density"]) == 128
    assert written["sae_cfg"]["architecture"] in trained.name
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_evaluate_undoes_the_scaling_that_a_checkpoint_expects(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    checkpoint = checkpoint_of(trained)
    metrics = evaluate_json(checkpoint, capsys)
    # The loader alone leaves the SAE on the scale of the trainer.
    sae = SAE.load_from_disk(checkpoint)
    assert sae.cfg.normalize_activations == "expected_average_only_in"
    scaler = json.loads((checkpoint / "activation_scaler.json").read_text())
    assert abs(scaler["scaling_factor"] - 1) > 0.1
    sae.fold_activation_norm_scaling_factor(scaler["scaling_factor"])
    sae.save_model(tmp_path / "folded")
    assert metrics == evaluate_json(tmp_path / "folded", capsys)

    copy = tmp_path / "without-scaler"
    shutil.copytree(checkpoint, copy)
    (copy / "activation_scaler.json").unlink()
    assert main(["evaluate", str(copy)]) == 1
    assert "activation_scaler.json is missing or incomplete" in capsys.readouterr().err
    # SAELens reads this as no scaling at all.
    (copy / "activation_scaler.json").write_text(
        '{"scaling_factor": null, "has_whitening": true}'
    )
    assert main(["evaluate", str(copy)]) == 1
    assert "activation_scaler.json is missing or incomplete" in capsys.readouterr().err


def test_evaluate_prints_a_table(trained: Path, capsys: pytest.CaptureFixture[str]):
    command = f"evaluate {trained / 'sae'} --n_eval_reconstruction_batches 1"
    command += " --n_eval_sparsity_variance_batches 1 --batch_size_prompts 2"
    assert main(command.split()) == 0
    rows = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(rows["sparsity.l0"]) <= 8
    assert "model_performance_preservation.ce_loss_score" in rows


def test_info_describes_an_SAE(trained: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["info", str(trained / "sae"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    sae = SAE.load_from_disk(trained / "sae")
    assert facts["architecture"] == sae.cfg.architecture()
    assert (facts["num_experts"], facts["k"], facts["latents_per_expert"]) == (4, 8, 32)
    assert facts["hook_name"] == "model.layers.0"
    assert facts["parameters"] == sum(p.numel() for p in sae.parameters())
    if facts["architecture"] == "scale":
        omega = torch.tensor(sae.cfg.metadata.omega)
        assert facts["omega"]["max"] == pytest.approx(omega.max().item())
        assert facts["experts_per_token"] == 2
    else:
        assert "omega" not in facts
        assert facts["experts_per_token"] == 1
    assert main(["info", str(trained / "sae")]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert ["num_experts", "4"] in [row.split() for row in rows]


def test_convert_writes_a_folder_that_SAELens_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    torch.manual_seed(0)
    torch.save(
        {
            "encoder.weight": torch.randn(40, 10),
            "decoder": torch.randn(40, 10),
            "router.weight": torch.randn(4, 10),
            "b_dec": torch.randn(10),
            "b_router": torch.randn(10),
        },
        tmp_path / "ae.pt",
    )
    target = tmp_path / "converted"
    command = f"convert {tmp_path / 'ae.pt'} {target}".split()
    assert main(command) == 1
    assert "k is needed" in capsys.readouterr().err
    assert not target.exists()
    options = (
        "--k 3 --no-heaviside --model_name gpt2 --hook_name blocks.8.hook_resid_post"
    )
    assert main([*command, *options.split()]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert main(["info", str(target), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["architecture"], facts["k"], facts["gate"]) == (
        "switch",
        3,
        "softmax",
    )
    assert facts["hook_name"] == "blocks.8.hook_resid_post"
    assert main([*command, *options.split()]) == 1
    assert "target must not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("train --architecture nonsense", 2, "invalid choice: 'nonsense'"),
        ("train --architecture scale --nonsense 1", 2, "arguments: --nonsense 1"),
        ("train --architecture scale --num_experts x", 2, "invalid int value: 'x'"),
        ("train --architecture scale --num_experts 7", 1, "and num_experts=7"),
        ("train --architecture switch --k 1000", 1, "k must be at most"),
        ("evaluate nowhere", 1, "nowhere is no folder"),
        ("evaluate nowhere some-id", 1, "nowhere not found"),
        ("info .", 1, "cfg.json"),
        ("convert nowhere target", 1, "nowhere"),
        ("evaluate . --output nowhere/metrics.json", 1, "nowhere is no folder"),
    ],
)
def test_errors_are_one_line_without_a_traceback(
    command: str,
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.chdir(tmp_path)
    try:
        assert main(command.split()) == status
    except SystemExit as stop:
        assert stop.code == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.startswith("sae-lens-scale: error: ")
    assert captured.err.count("\n") == 1


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]):
    for command in ([], ["experiment"], ["info"], ["info", "folder", "id", "more"]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2
        assert "usage: sae-lens-scale" in capsys.readouterr().err


def test_a_traceback_is_there_for_the_asking():
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "info", "nowhere"])


def test_evaluate_says_what_the_metadata_lack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cfg = ScaleTrainingSAEConfig(d_in=32, d_sae=128, num_experts=4)
    ScaleTrainingSAE(cfg).save_inference_model(tmp_path)
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "--dataset is needed" in capsys.readouterr().err


def test_the_command_is_installed():
    (script,) = entry_points(group="console_scripts", name="sae-lens-scale")
    assert script.load() is main


def test_the_package_is_the_same_command():
    command = [sys.executable, "-m", "sae_lens_scale", "info", "nowhere"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    message = "nowhere is no folder; of a release or repository, name the SAE too"
    assert done.stderr.splitlines()[-1] == f"sae-lens-scale: error: {message}"


def test_convert_help_names_every_format(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["convert", "--help"])
    assert stop.value.code == 0
    # Lines also end after hyphens.
    out = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    for form in FORMATS:
        assert form.name in out


def test_an_interrupted_training_leaves_a_checkpoint_and_status_130(
    tiny_llama: Path, text_folder: Path, tmp_path: Path
):
    command = train_command("scale", tiny_llama, text_folder, tmp_path, tokens=10**8)
    script = "import sys; from sae_lens_scale.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *command],
        stderr=subprocess.PIPE,
        text=True,
    )
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
    command = train_command(
        "scale", tiny_llama, text_folder, tmp_path, tokens=seen + 512
    )
    # The checkpoint has the factors.
    command = command[: command.index("--lr_factors")]
    assert main([*command, "--resume_from_checkpoint", str(checkpoint)]) == 0
    after = SAE.load_from_disk(tmp_path / "sae")
    assert not after.get_parameter("b_router").any()
    assert after.cfg.architecture() == before.cfg.architecture()
    assert not torch.equal(after.W_enc, before.W_enc)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--training_tokens -5", "--training_tokens must be positive, got -5"),
        ("--output_path {file}", "--output_path: {file} is no folder"),
        ("--checkpoint_path {file}/x", "--checkpoint_path: {file} is no folder"),
    ],
)
def test_train_refuses_what_would_cost_the_result(
    option: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "file"
    file.touch()
    # Neither model nor data set exists: these are looked at first.
    command = train_command("scale", tmp_path / "a", tmp_path / "b", tmp_path)
    assert main([*command, *option.format(file=file).split()]) == 1
    assert message.format(file=file) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "TypeError"),
        ("{", "Expecting property name"),
        ('{"architecture": "nonsense", "dtype": "float32"}', "KeyError: 'nonsense'"),
        (
            '{"architecture": "scale", "dtype": "float32", "metadata": 3}',
            "AttributeError",
        ),
    ],
)
def test_an_SAE_that_cannot_be_loaded_is_named(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cfg = ScaleTrainingSAEConfig(d_in=32, d_sae=128, num_experts=4)
    ScaleTrainingSAE(cfg).save_inference_model(tmp_path)
    (tmp_path / "cfg.json").write_text(content)
    assert main(["info", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    error = f"sae-lens-scale: error: {tmp_path} cannot be loaded: "
    assert captured.err.startswith(error)
    assert message in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)


def with_metadata(sae: Path, target: Path, **metadata: Any) -> Path:
    shutil.copytree(sae, target)
    cfg = json.loads((sae / "cfg.json").read_text())
    cfg["metadata"].update(metadata)
    (target / "cfg.json").write_text(json.dumps(cfg))
    return target


def test_odd_metadata_are_errors_in_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name, command, metadata, message in (
        ("omega", "info", {"omega": "abc"}, "TypeError: "),
        ("hook", "evaluate", {"hook_name": None}, "metadata name no hook"),
        ("length", "evaluate", {"context_size": "32"}, "TypeError: "),
    ):
        sae = with_metadata(trained / "sae", tmp_path / name, **metadata)
        assert main([command, str(sae)]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        last_line = captured.err.splitlines()[-1]
        assert last_line.startswith("sae-lens-scale: error: ")
        assert message in last_line
        assert "Traceback" not in captured.err
    empty = with_metadata(trained / "sae", tmp_path / "empty", omega=[])
    assert main(["info", str(empty)]) == 0


def test_info_describes_a_checkpoint_as_it_was_saved(
    trained: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["info", str(checkpoint_of(trained)), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["normalize_activations"] == "expected_average_only_in"


def test_evaluate_looks_for_the_hook_in_the_model(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["evaluate", str(trained / "sae"), "--model", "smollm2"]
    assert main(command) == 1
    assert "smollm2 has no hook 'model.layers.0'" in capsys.readouterr().err


def test_output_is_written_whole_or_not_at_all(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = f"evaluate {trained / 'sae'} --n_eval_reconstruction_batches 1"
    command += " --n_eval_sparsity_variance_batches 1 --batch_size_prompts 2 --output"
    assert main([*command.split(), str(tmp_path)]) == 1
    assert f"--output: {tmp_path} is a folder" in capsys.readouterr().err
    # A pipe stays one.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert main([*command.split(), str(pipe)]) == 0
    assert os.read(reader, 9) == b'{\n "sae": '[:9]
    os.close(reader)
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_evaluate_takes_positive_numbers_only(capsys: pytest.CaptureFixture[str]):
    for number in ("0", "-3", "x"):
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", "folder", "--batch_size_prompts", number])
        assert stop.value.code == 2
        assert f"must be a positive integer, got '{number}'" in capsys.readouterr().err


def test_closed_pipe_ends_a_command_quietly(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    cfg = ScaleTrainingSAEConfig(d_in=32, d_sae=128, num_experts=4)
    ScaleTrainingSAE(cfg).save_inference_model(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["info", str(tmp_path)]) == 0
        # As Python does at exit.
        closed.flush()
    assert capsys.readouterr().err == ""


def test_convert_calls_any_other_file_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = tmp_path / "ae.pt"
    for content in (b"hi", b"", b"PK\x03\x04", b"\x80\x02]q"):
        source.write_bytes(content)
        assert main(["convert", str(source), str(tmp_path / "target")]) == 1
        assert f"{source} is damaged" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ae.pt"]

"""``sae-lens-scale train`` on a language model in a folder."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.runs import checkpoint_of, train_command
from sae_lens.saes.sae import SAE

from sae_lens_scale.cli import main, train


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

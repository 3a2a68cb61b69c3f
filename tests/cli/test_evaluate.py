"""``sae-lens-scale evaluate`` on trained SAEs."""

import json
import os
import shutil
from pathlib import Path

import pytest
from cli.runs import checkpoint_of
from sae_lens.saes.sae import SAE

from sae_lens_scale import ScaleTrainingSAE, ScaleTrainingSAEConfig
from sae_lens_scale.cli import main


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


def test_evaluate_says_what_the_metadata_lack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cfg = ScaleTrainingSAEConfig(d_in=32, d_sae=128, num_experts=4)
    ScaleTrainingSAE(cfg).save_inference_model(tmp_path)
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "--dataset is needed" in capsys.readouterr().err


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

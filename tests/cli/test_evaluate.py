"""``sae-lens-scale evaluate`` on trained SAEs."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from cli.runs import Run, checkpoint_of
from sae_lens.saes.sae import SAE

SHORT = (
    "--n_eval_reconstruction_batches 2 --n_eval_sparsity_variance_batches 2 "
    "--batch_size_prompts 4"
)


def metrics_of(run: Run, sae: Path, options: str = "") -> dict[str, Any]:
    return json.loads(run(f"evaluate {sae} {SHORT} --json {options}").out)


def test_evaluate_needs_nothing_but_the_folder(trained: Path, tmp_path: Path, run: Run):
    output = tmp_path / "metrics.json"
    metrics = metrics_of(run, trained / "sae", f"--output {output}")
    assert 0 < metrics["sparsity"]["l0"] <= 8
    assert 0.2 < metrics["reconstruction_quality"]["explained_variance"] < 1
    assert metrics["token_stats"]["total_tokens_eval_reconstruction"] == 2 * 4 * 32
    written = json.loads(output.read_text())
    assert written["metrics"] == metrics
    assert len(written["feature_metrics"]["feature_density"]) == 128
    assert written["sae_cfg"]["architecture"] in trained.name
    assert list(tmp_path.iterdir()) == [output]
    table = run(f"evaluate {trained / 'sae'} {SHORT}").out
    rows = dict(line.split() for line in table.splitlines())
    assert float(rows["sparsity.l0"]) <= 8
    assert "model_performance_preservation.ce_loss_score" in rows


def test_evaluate_undoes_the_scaling_that_a_checkpoint_expects(
    trained: Path, tmp_path: Path, run: Run
):
    checkpoint = checkpoint_of(trained)
    metrics = metrics_of(run, checkpoint)
    # The loader alone leaves the SAE on the scale of the trainer.
    sae = SAE.load_from_disk(checkpoint)
    assert sae.cfg.normalize_activations == "expected_average_only_in"
    scaler = json.loads((checkpoint / "activation_scaler.json").read_text())
    assert abs(scaler["scaling_factor"] - 1) > 0.1
    sae.fold_activation_norm_scaling_factor(scaler["scaling_factor"])
    sae.save_model(tmp_path / "folded")
    assert metrics == metrics_of(run, tmp_path / "folded")

    copy = shutil.copytree(checkpoint, tmp_path / "without-scaler")
    (copy / "activation_scaler.json").unlink()
    message = "activation_scaler.json is missing or incomplete"
    assert message in run(f"evaluate {copy}", 1).err
    # SAELens reads this as no scaling at all.
    (copy / "activation_scaler.json").write_text(
        '{"scaling_factor": null, "has_whitening": true}'
    )
    assert message in run(f"evaluate {copy}", 1).err


def test_evaluate_says_what_the_metadata_lack(untrained: Path, run: Run):
    assert "--dataset is needed" in run(f"evaluate {untrained}", 1).err


def test_evaluate_looks_for_the_hook_in_the_model(trained: Path, run: Run):
    err = run(f"evaluate {trained / 'sae'} --model smollm2", 1).err
    assert "smollm2 has no hook 'model.layers.0'" in err


def test_output_is_written_whole_or_not_at_all(trained: Path, tmp_path: Path, run: Run):
    command = f"evaluate {trained / 'sae'} {SHORT} --output"
    assert f"--output: {tmp_path} is a folder" in run(f"{command} {tmp_path}", 1).err
    # A pipe stays one.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    run(f"{command} {pipe}")
    assert os.read(reader, 9) == b'{\n "sae":'
    os.close(reader)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]

"""``sae-lens-scale upload``."""

import json
from pathlib import Path

import pytest
from cli.runs import Run, checkpoint_of
from integration.hub import Hub


def test_upload_prints_where_the_card_is(trained: Path, hub: Hub, run: Run):
    sae = trained / "sae"
    short = "--n_eval_reconstruction_batches 1 --n_eval_sparsity_variance_batches 1"
    metrics = trained / "metrics.json"
    run(f"evaluate {sae} {short} --batch_size_prompts 4 --output {metrics}")
    captured = run(f"upload {sae} lab/saes first --metrics {metrics} --private")
    assert captured.out == f"{hub.url}/lab/saes\n"
    assert hub.private == {"lab/saes"}
    card = hub.repos["lab/saes"]["README.md"].decode()
    assert "| ce_loss_score |" in card
    assert "| training_tokens | 12288 |" in card
    assert "model.layers.0" in card
    facts = run("info lab/saes first").out
    assert "model.layers.0" in facts


def test_upload_knows_an_SAE_that_was_evaluated_with_other_prompts(
    trained: Path, hub: Hub, tmp_path: Path, run: Run
):
    sae, metrics = trained / "sae", tmp_path / "metrics.json"
    short = "--n_eval_sparsity_variance_batches 1 --batch_size_prompts 4"
    other = f"--no-prepend_bos --compute_l2_norms --output {metrics}"
    run(f"evaluate {sae} {short} {other}")
    result = json.loads(metrics.read_text())
    assert result["sae_cfg"]["metadata"]["prepend_bos"] is True
    assert result["eval_cfg"]["prepend_bos"] is False
    run(f"upload {sae} lab/saes --metrics {metrics}")
    assert "| l2_ratio |" in hub.repos["lab/saes"]["README.md"].decode()


def test_upload_refuses_in_one_line(
    trained: Path, hub: Hub, run: Run, monkeypatch: pytest.MonkeyPatch
):
    commands = {
        "upload nowhere lab/saes": "nowhere is no folder",
        f"upload {checkpoint_of(trained)} lab/saes": "holds a training checkpoint",
        f"upload {trained / 'sae'} elsewhere/saes": "no rights in elsewhere",
    }
    for command, message in commands.items():
        err = run(command, 1).err
        assert message in err
        assert (err.count("\n"), err.count("Traceback")) == (1, 0)
    monkeypatch.delenv("HF_TOKEN")
    err = run(f"upload {trained / 'sae'} lab/saes", 1).err
    assert "hf auth login" in err
    assert err.count("\n") == 1
    assert not hub.repos

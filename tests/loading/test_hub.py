"""Uploading exports, with the real ``huggingface_hub`` client."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from integration.hub import READ_ONLY, TOKEN, Hub
from sae_lens import SAE, upload_saes_to_huggingface
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from typing_extensions import override

from sae_lens_scale import (
    ScaleSAE,
    ScaleSAEConfig,
    ScaleTrainingSAE,
    ScaleTrainingSAEConfig,
)
from sae_lens_scale.files import dump_json
from sae_lens_scale.loading.hub import upload

REPO = "lab/saes"
# Of real runs.
FILES = Path(__file__).parents[1] / "data" / "0.1.0"
SCALE, SWITCH = FILES / "scale" / "export", FILES / "switch" / "export"
both = pytest.mark.parametrize(
    "export", [pytest.param(SCALE, id="scale"), pytest.param(SWITCH, id="switch")]
)


def readme(hub: Hub) -> str:
    return hub.repos[REPO]["README.md"].decode()


def evaluation_of(export: Path, **changes: Any) -> str:
    """Output of ``evaluate --output``, with few metrics."""
    cfg = SAE.load_from_disk(export).cfg.to_dict()
    groups = {"sparsity": {"l0": 3.25}, "token_stats": {"total_tokens": 512}}
    texts = {"dataset": "some/text"}
    result = {"sae_cfg": cfg, "eval_cfg": texts, "metrics": groups}
    return dump_json({**result, **changes})


@both
def test_an_upload_loads_with_the_lines_of_its_card(export: Path, hub: Hub):
    assert upload(export, REPO, "blocks.0/a") == f"{hub.url}/{REPO}"
    (snippet,) = re.findall(r"```python\n(.*?)```", readme(hub), re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(snippet, namespace)
    loaded, expected = namespace["sae"], SAE.load_from_disk(export)
    assert "import sae_lens_scale" in snippet
    assert loaded.cfg.to_dict() == expected.cfg.to_dict()
    torch.testing.assert_close(
        loaded.state_dict(), expected.state_dict(), atol=0, rtol=0
    )


@both
def test_the_card_states_sizes_training_and_paper(export: Path, hub: Hub):
    upload(export, REPO)
    card = ModelCard(readme(hub))
    architecture = export.parent.name
    assert card.data["library_name"] == "saelens"
    assert {"sae-lens-scale", architecture} <= set(card.data["tags"])
    text = card.text
    assert text.startswith("# saes\n")
    # By default an SAE is called as its folder.
    assert "\n## export\n" in text
    assert "`blocks.0.hook_resid_post` of `tiny`" in text
    rows = dict(re.findall(r"^\| (\S.*?) \| (.*?) \|$", text, re.MULTILINE))
    cfg = SAE.load_from_disk(export).cfg.to_dict()
    assert (rows["d_in"], rows["d_sae"]) == ("8", "64")
    assert rows["experts (num_experts)"] == str(cfg["num_experts"])
    assert rows["active latents per token (k)"] == str(cfg["k"])
    assert (rows["training_tokens"], rows["lr"]) == ("4096", "0.005")
    assert rows["load_balance_coefficient"] == "0.05"
    paper = {"scale": "arxiv.org/abs/2511.05745", "switch": "arxiv.org/abs/2410.08201"}
    assert paper[architecture] in text


class OwnConfig(ScaleSAEConfig):
    """An architecture of a user's own."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "custom"


class OwnTrainingConfig(ScaleTrainingSAEConfig):
    """Its training config."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "custom"


def test_an_architecture_of_the_users_own_has_a_card_without_a_paper(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for registry, entry in (
        (SAE_CLASS_REGISTRY, (ScaleSAE, OwnConfig)),
        (SAE_TRAINING_CLASS_REGISTRY, (ScaleTrainingSAE, OwnTrainingConfig)),
    ):
        monkeypatch.setitem(registry, "custom", entry)
    folder = shutil.copytree(SCALE, tmp_path / "a")
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**cfg, "architecture": "custom"}))
    upload(folder, REPO)
    assert "A Custom SAE" in readme(hub)
    assert "Paper" not in readme(hub)


def test_a_converted_SAE_needs_no_runner_config(hub: Hub, tmp_path: Path):
    folder = shutil.copytree(SCALE, tmp_path / "a")
    (folder / "runner_cfg.json").unlink()
    upload(folder, REPO)
    assert "training_tokens" not in readme(hub)
    assert "| load_balance_coefficient | 0.05 |" in readme(hub)


def test_each_SAE_of_a_repository_has_its_section(hub: Hub, tmp_path: Path):
    upload(SCALE, REPO, "a")
    hub.repos[REPO]["README.md"] += b"\nOur own words.\n"
    upload(SWITCH, REPO, "b")
    upload(SWITCH, REPO, "a")
    text = readme(hub)
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == ["a", "b"]
    assert text.index("## a") < text.index("Our own words.") < text.index("## b")
    assert "A Scale SAE" not in text
    for sae_id in ("a", "b"):
        assert SAE.from_pretrained(REPO, sae_id).cfg.architecture() == "switch"


def test_SAELenss_own_card_is_kept_and_completed(hub: Hub):
    upload_saes_to_huggingface({"a": SCALE}, REPO, show_progress=False)
    before = ModelCard(readme(hub)).text.rstrip()
    upload(SWITCH, REPO, "b")
    text = ModelCard(readme(hub)).text
    assert text.startswith(before)
    assert "import sae_lens_scale" in text.removeprefix(before)


def test_metrics_come_from_a_file_or_the_folder(hub: Hub, tmp_path: Path):
    folder = shutil.copytree(SCALE, tmp_path / "a")
    upload(folder, REPO)
    assert "| l0 |" not in readme(hub)
    (folder / "metrics.json").write_text(evaluation_of(SCALE))
    upload(folder, REPO)
    assert "| l0 | 3.25 |\n| total_tokens | 512 |" in readme(hub)
    assert "on `some/text`" in readme(hub)
    # Only what SAELens uploads is there.
    assert "a/metrics.json" not in hub.repos[REPO]
    other = tmp_path / "other.json"
    other.write_text(evaluation_of(SCALE, metrics={"sparsity": {"l0": 2.5}}))
    upload(folder, REPO, metrics=other)
    assert "| l0 | 2.5 |" in readme(hub)


def test_of_several_evaluations_those_of_the_SAE_count(hub: Hub, tmp_path: Path):
    results = [
        evaluation_of(SWITCH, eval_cfg={"dataset": "not/ours"}),
        evaluation_of(SCALE, eval_cfg={"dataset": "first/text"}),
        evaluation_of(SCALE, eval_cfg={"dataset": "second/text"}),
    ]
    metrics = tmp_path / "metrics.json"
    metrics.write_text(f"[{', '.join(results)}]")
    upload(SCALE, REPO, metrics=metrics)
    texts = re.findall(r"evaluation on `(.*)`", readme(hub))
    assert texts == ["first/text", "second/text"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON that sae-lens-scale evaluate"),
        ("[3]", "must be JSON that sae-lens-scale evaluate"),
        ("[]", "is about another SAE"),
        ('{"saes": {}}', "must be JSON that sae-lens-scale evaluate"),
        (evaluation_of(SWITCH), "is about another SAE"),
        (
            evaluation_of(SCALE, metrics={"l0": 3.25}),
            "must be JSON that sae-lens-scale",
        ),
    ],
    ids=["no JSON", "numbers", "nothing", "other metrics", "another SAE", "no groups"],
)
def test_foreign_metrics_are_refused(
    content: str, message: str, hub: Hub, tmp_path: Path
):
    metrics = tmp_path / "metrics.json"
    metrics.write_text(content)
    with pytest.raises(ValueError, match=f"metrics: {metrics} {message}"):
        upload(SCALE, REPO, metrics=metrics)
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        upload(SCALE, REPO, metrics="nowhere.json")
    assert not hub.repos


def test_what_is_no_export_is_refused(hub: Hub, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        upload("nowhere", REPO)
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be loaded: .*cfg.json"):
        upload(tmp_path, REPO)
    with pytest.raises(ValueError, match="holds a training checkpoint; upload the exp"):
        upload(FILES / "scale" / "checkpoint", REPO)
    with pytest.raises(ValueError, match="holds a training checkpoint; upload the exp"):
        upload(FILES / "switch" / "checkpoint", REPO)
    TopKSAE(TopKSAEConfig(d_in=4, d_sae=8, k=2)).save_model(tmp_path / "topk")
    with pytest.raises(ValueError, match="'topk' SAE, which sae_lens.upload_saes_to"):
        upload(tmp_path / "topk", REPO)
    damaged = shutil.copytree(SCALE, tmp_path / "damaged")
    weights = damaged / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged cannot be loaded: SafetensorError"):
        upload(damaged, REPO)
    assert not hub.requests


def test_a_damaged_config_of_the_run_is_named(hub: Hub, tmp_path: Path):
    folder = shutil.copytree(SCALE, tmp_path / "a")
    (folder / "runner_cfg.json").write_text("{")
    with pytest.raises(ValueError, match=r"a/runner_cfg.json is not JSON: Expecting"):
        upload(folder, REPO)
    assert not hub.requests


@pytest.mark.parametrize("name", ["", ".", "../a", "a/", "/a", "a b", "a-->", "a//b"])
def test_names_that_are_none_are_refused(name: str, hub: Hub):
    with pytest.raises(ValueError, match="sae_id must be made of letters"):
        upload(SCALE, REPO, name)
    with pytest.raises(ValueError, match="repo_id must be OWNER/NAME, got 'saes'"):
        upload(SCALE, "saes")
    with pytest.raises(ValueError, match="Repo id must"):
        upload(SCALE, "lab/saes/a")
    assert not hub.requests


@pytest.mark.parametrize("token", [None, "hf_expired"], ids=["none", "expired"])
def test_without_a_valid_token_nothing_is_uploaded(
    token: str | None, hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(OSError, match="[Tt]oken"):
        upload(SCALE, REPO)
    assert not hub.repos
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    upload(SCALE, REPO)
    assert hub.repos


@pytest.mark.parametrize("files", [None, {}], ids=["new", "existing"])
def test_without_the_right_to_write_nothing_is_uploaded(
    files: dict[str, bytes] | None, hub: Hub
):
    repo = f"{READ_ONLY}/saes"
    if files is not None:
        hub.repos[repo] = files
    with pytest.raises(OSError, match=f"403.*no rights in {READ_ONLY}"):
        upload(SCALE, repo)
    assert not hub.repos.get(repo)


def test_private_makes_the_repository_private_or_fails(hub: Hub):
    upload(SCALE, REPO, "a", private=True)
    upload(SWITCH, REPO, "b", private=True)
    assert hub.private == {REPO}
    upload(SCALE, "lab/public")
    before = dict(hub.repos["lab/public"])
    with pytest.raises(ValueError, match="private: lab/public exists and is public"):
        upload(SWITCH, "lab/public", "b", private=True)
    assert hub.repos["lab/public"] == before
    assert json.loads(before["export/cfg.json"])["architecture"] == "scale"

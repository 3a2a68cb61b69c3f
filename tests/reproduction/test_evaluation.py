"""Loss Recovered of finished runs."""

import math
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_corpus
from sae_lens import HookedSAETransformer
from sae_lens.saes.sae import SAE
from tiny_cache import SETTINGS, TEXTS

from reproduction.caching import cache_activations
from reproduction.evaluation import LossMeter, evaluate_records
from reproduction.records import read, read_records
from reproduction.settings import RunSettings
from reproduction.training import train_run
from sae_lens_scale.analysis.evaluation import loss_recovered

RUNS = [
    RunSettings(architecture, sae, batch_size=64, training_tokens=640)
    for architecture, sae in (
        ("scale", {"d_sae": 64, "num_experts": 8, "k": 4}),
        ("topk", {"d_sae": 32, "k": 4}),
    )
]


@pytest.fixture(scope="module")
def runs(
    tiny_model: HookedSAETransformer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Records of two SAEs of a tiny model, with weights."""
    folder = tmp_path_factory.mktemp("runs")
    cache = cache_activations(
        SETTINGS, folder / "activations", model=tiny_model, texts=TEXTS
    )
    for run in RUNS:
        train_run(run, cache, folder / "runs", keep_weights=True, measures=False)
    return folder / "runs"


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.architecture)
def test_the_meter_shows_what_loss_recovered_does(
    run: RunSettings, runs: Path, tiny_model: HookedSAETransformer
):
    sae = SAE.load_from_disk(runs / run.name)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 40_000, (5, 24), generator=generator)
    tokens[:, 0] = tokens[2, 7] = 1
    batches = list(tokens.split(2))
    found = LossMeter(tiny_model, SETTINGS.hook_name, batches).measure(sae)
    wanted = loss_recovered(tiny_model, sae, batches)
    assert found.predictions == wanted.predictions == 5 * 23 - 5 - 1
    for name in ("without_sae", "with_ablation", "with_sae"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), abs=1e-5)
    # A random model's losses hardly differ.
    assert found.score == pytest.approx(wanted.score, abs=1e-2)
    assert not any(point.fwd_hooks for point in tiny_model.hook_dict.values())


def test_records_are_completed_once(
    runs: Path, tiny_model: HookedSAETransformer, tmp_path: Path
):
    before = read_records(runs)
    options: dict[str, Any] = {"model": tiny_model, "texts": TEXTS, "contexts": 6}
    assert len(evaluate_records(runs, SETTINGS, **options)) == 2
    for old, new in zip(before, read_records(runs), strict=True):
        result = new.measures["loss_recovered"]
        assert set(result) == {"contexts", "in_domain", "other_domain"}
        assert result["in_domain"] != result["other_domain"]
        assert result["in_domain"]["predictions"] <= 6 * 31
        kept = {n: v for n, v in new.measures.items() if n != "loss_recovered"}
        assert replace(new, measures=kept) == old
    frame = read(runs)
    for name in ("loss_recovered", "loss_recovered_other_domain"):
        assert all(map(math.isfinite, frame[name].tolist()))
    # Neither those that have it nor those without weights.
    assert evaluate_records(runs, SETTINGS, **options) == []
    before[0].write(tmp_path)
    assert evaluate_records(tmp_path, SETTINGS, **options) == []
    assert len(evaluate_records(runs, SETTINGS, **{**options, "contexts": 5})) == 2


def test_more_contexts_than_there_are_is_an_error(
    runs: Path, tiny_model: HookedSAETransformer
):
    with pytest.raises(ValueError, match=r"contexts must be at most the \d+ of some"):
        evaluate_records(runs, SETTINGS, model=tiny_model, texts=TEXTS, contexts=10**6)
    with pytest.raises(ValueError, match="contexts must be positive, got 0"):
        evaluate_records(runs, SETTINGS, contexts=0)


def test_an_SAE_is_evaluated_on_what_it_was_measured_on(
    runs: Path, tiny_model: HookedSAETransformer, tmp_path: Path
):
    options: dict[str, Any] = {"model": tiny_model, "contexts": 3}
    folder = tmp_path / "runs"
    shutil.copytree(runs, folder)
    hook = replace(SETTINGS, hook_name="blocks.1.hook_resid_pre")
    with pytest.raises(ValueError, match=f"were of hook_name='{SETTINGS.hook_name}'"):
        evaluate_records(folder, hook, texts=TEXTS, **options)
    # Installed packages change, and with them what settings do not say.
    other = {**TEXTS, "in_domain": small_corpus().select(range(20, 40))}
    with pytest.raises(ValueError, match=r"measured on another text \(\w{16}\) than"):
        evaluate_records(folder, SETTINGS, texts=other, **options)


def test_what_was_evaluated_before_an_interruption_is_kept(
    runs: Path,
    tiny_model: HookedSAETransformer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    folder = tmp_path / "runs"
    shutil.copytree(runs, folder)
    options: dict[str, Any] = {"model": tiny_model, "texts": TEXTS, "contexts": 3}
    measure, calls = LossMeter.measure, []

    def interrupted(meter: LossMeter, sae: SAE[Any]) -> Any:
        calls.append(sae)
        # Of two SAEs, each on two texts.
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(meter, sae)

    monkeypatch.setattr(LossMeter, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_records(folder, SETTINGS, **options)
    assert len(evaluate_records(folder, SETTINGS, **options)) == 1
    assert len(calls) == 5


def test_the_meter_needs_a_hook_that_matters(tiny_model: HookedSAETransformer):
    tokens = torch.randint(5, 40_000, (2, 8))
    model, hook = deepcopy(tiny_model), "blocks.0.attn.hook_z"
    LossMeter(model, hook, [tokens])
    dict(model.named_parameters())["blocks.0.attn.W_O"].data.zero_()
    with pytest.raises(ValueError, match=f"zeros at {hook} must change"):
        LossMeter(model, hook, [tokens])


def test_records_of_another_text_are_not_added_to(
    runs: Path, tiny_model: HookedSAETransformer, tmp_path: Path
):
    options: dict[str, Any] = {"model": tiny_model, "contexts": 4}
    folder = tmp_path / "runs"
    shutil.copytree(runs, folder)
    evaluate_records(folder, SETTINGS, texts=TEXTS, **options)
    pending = read_records(folder)[0]
    del pending.measures["loss_recovered"]
    # As of activations that were in memory only.
    assert pending.cache
    del pending.cache["texts"]
    pending.write(folder)
    other = {**TEXTS, "in_domain": small_corpus().select(range(20, 40))}
    with pytest.raises(ValueError, match="evaluated on another text than the some t"):
        evaluate_records(folder, SETTINGS, texts=other, **options)
    assert "loss_recovered" not in read_records(folder)[0].measures
    assert len(evaluate_records(folder, SETTINGS, texts=TEXTS, **options)) == 1

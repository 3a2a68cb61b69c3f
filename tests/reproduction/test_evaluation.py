"""Loss Recovered of finished runs."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_corpus
from sae_lens import HookedSAETransformer
from sae_lens.saes.sae import SAE
from tiny_cache import SETTINGS, TEXTS

from reproduction import evaluation as module
from reproduction.caching import cache_activations, token_store
from reproduction.evaluation import evaluate_records
from reproduction.records import RunRecord, read, read_records
from reproduction.settings import RunSettings
from reproduction.training import train_run
from sae_lens_scale.analysis.evaluation import loss_recovered

Evaluate = Callable[..., list[RunRecord]]
RUNS = [
    RunSettings(architecture, sae, batch_size=64, training_tokens=640)
    for architecture, sae in (
        ("scale", {"d_sae": 64, "num_experts": 8, "k": 4}),
        ("topk", {"d_sae": 32, "k": 4}),
    )
]
OTHER_TEXTS = {**TEXTS, "in_domain": small_corpus().select(range(20, 40))}


@pytest.fixture(scope="module")
def trained(
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


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "runs")


@pytest.fixture
def evaluate(runs: Path, tiny_model: HookedSAETransformer) -> Evaluate:
    def evaluate(folder: Path = runs, **changes: Any) -> list[RunRecord]:
        options = {"model": tiny_model, "texts": TEXTS, "contexts": 4, **changes}
        return evaluate_records(folder, options.pop("settings", SETTINGS), **options)

    return evaluate


def test_a_record_gets_what_loss_recovered_says_of_the_first_contexts(
    runs: Path,
    evaluate: Evaluate,
    tiny_model: HookedSAETransformer,
):
    evaluate(prompts_per_batch=2)
    hook_name, context_size = SETTINGS.hook_name, SETTINGS.context_size
    for record in read_records(runs):
        sae = SAE.load_from_disk(runs / record.name)
        for name in ("in_domain", "other_domain"):
            store = token_store(tiny_model, TEXTS[name], hook_name, context_size)
            tokens = torch.stack([*islice(store.iterable_sequences, 4)])
            wanted = loss_recovered(tiny_model, sae, [tokens])
            found = record.measures["loss_recovered"][name]
            assert found["predictions"] == wanted.predictions > 0
            for loss in ("without_sae", "with_ablation", "with_sae"):
                assert found[loss] == pytest.approx(getattr(wanted, loss), abs=1e-5)
    assert not any(point.fwd_hooks for point in tiny_model.hook_dict.values())


def test_records_are_completed_once(runs: Path, tmp_path: Path, evaluate: Evaluate):
    before = read_records(runs)
    assert len(evaluate(contexts=6)) == 2
    for old, new in zip(before, read_records(runs), strict=True):
        result = new.measures.pop("loss_recovered")
        assert set(result) == {"contexts", "in_domain", "other_domain"}
        assert result["in_domain"] != result["other_domain"]
        assert result["in_domain"]["predictions"] <= 6 * 31
        assert new == old
    frame = read(runs)
    for name in ("loss_recovered", "loss_recovered_other_domain"):
        assert all(map(math.isfinite, frame[name].tolist()))
    # Neither those that have it nor those without weights.
    assert evaluate(contexts=6) == []
    before[0].write(tmp_path)
    assert evaluate(tmp_path) == []
    assert len(evaluate(contexts=5)) == 2


def test_an_SAE_is_evaluated_on_what_it_was_measured_on(
    evaluate: Evaluate,
):
    hook = replace(SETTINGS, hook_name="blocks.1.hook_resid_pre")
    with pytest.raises(ValueError, match=f"were of hook_name='{SETTINGS.hook_name}'"):
        evaluate(settings=hook)
    # Installed packages change, and with them what settings do not say.
    with pytest.raises(ValueError, match=r"measured on another text \(\w{16}\) than"):
        evaluate(texts=OTHER_TEXTS)
    with pytest.raises(ValueError, match=r"contexts must be at most the \d+ of some"):
        evaluate(contexts=10**6)
    with pytest.raises(ValueError, match="contexts must be positive, got 0"):
        evaluate(contexts=0)


def test_an_interruption_keeps_what_was_evaluated_before(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        # Of two SAEs, each on two texts.
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss_recovered(*arguments)

    monkeypatch.setattr(module, "loss_recovered", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate()
    assert len(evaluate()) == 1
    assert len(calls) == 5


def test_records_of_another_text_are_not_added_to(runs: Path, evaluate: Evaluate):
    evaluate()
    pending = read_records(runs)[0]
    del pending.measures["loss_recovered"]
    # As of activations that were in memory only.
    assert pending.cache
    del pending.cache["texts"]
    pending.write(runs)
    with pytest.raises(ValueError, match="evaluated on another text than the some t"):
        evaluate(texts=OTHER_TEXTS)
    assert "loss_recovered" not in read_records(runs)[0].measures
    assert len(evaluate()) == 1

"""Loss Recovered of finished runs."""

import math
import shutil
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


def test_a_record_gets_what_loss_recovered_says_of_the_first_contexts(
    runs: Path, tiny_model: HookedSAETransformer, tmp_path: Path
):
    folder = tmp_path / "runs"
    shutil.copytree(runs, folder)
    options: dict[str, Any] = {"model": tiny_model, "texts": TEXTS, "contexts": 5}
    evaluate_records(folder, SETTINGS, prompts_per_batch=2, **options)
    for record in read_records(folder):
        sae = SAE.load_from_disk(folder / record.name)
        for name in ("in_domain", "other_domain"):
            store = token_store(
                tiny_model,
                TEXTS[name],
                SETTINGS.hook_name,
                SETTINGS.context_size,
            )
            tokens = torch.stack([*islice(store.iterable_sequences, 5)])
            wanted = loss_recovered(tiny_model, sae, [tokens])
            found = record.measures["loss_recovered"][name]
            assert found["predictions"] == wanted.predictions > 0
            for loss in ("without_sae", "with_ablation", "with_sae"):
                assert found[loss] == pytest.approx(getattr(wanted, loss), abs=1e-5)
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
    calls = []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        # Of two SAEs, each on two texts.
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss_recovered(*arguments)

    monkeypatch.setattr(module, "loss_recovered", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_records(folder, SETTINGS, **options)
    assert len(evaluate_records(folder, SETTINGS, **options)) == 1
    assert len(calls) == 5


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

"""Sparse probing by sae-probes itself, on activations of a tiny model and planted ones."""

import copy
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import files_no_larger_than, random_transformer
from sae_lens import HookedSAETransformer, StandardSAE, StandardSAEConfig

from sae_lens_scale.analysis.scores.probing import (
    cache_activations,
    dataset_characters,
    missing_activations,
    shortest_datasets,
    sparse_probing,
)

# Only the environment of these tests has it.
utils_data: Any = import_module("sae_probes.utils_data")

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def dataset() -> str:
    """Name of the shortest data set: a thousand texts of two or three words."""
    (name,) = shortest_datasets(1)
    return name


@pytest.fixture(scope="module")
def small_model(smollm2: HookedSAETransformer) -> HookedSAETransformer:
    return random_transformer(smollm2.tokenizer, n_layers=1, n_heads=2, d_head=4)


@pytest.fixture(scope="module")
def folder(
    small_model: HookedSAETransformer,
    dataset: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Folder of the data set's activations."""
    folder = tmp_path_factory.mktemp("activations")
    cache_activations(small_model, HOOK, [dataset], folder, 8, "cpu")
    return folder


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_shortest_data_sets_come_first():
    characters = dataset_characters()
    assert len(characters) == 113
    assert list(characters.values()) == sorted(characters.values())
    assert shortest_datasets(2) == list(characters)[:2]
    for number in (0, 114):
        with pytest.raises(ValueError, match=f"between 1 and 113, got {number}"):
            shortest_datasets(number)


def test_activations_are_those_of_the_last_token(
    small_model: HookedSAETransformer, dataset: str, folder: Path
):
    (file,) = files(folder)
    found = torch.load(file)
    texts = utils_data.read_numbered_dataset_df(dataset)["prompt"]
    assert len(found) == len(texts)
    tokenizer: Any = small_model.tokenizer
    for row in (0, 500):
        ids = tokenizer(texts[row], return_tensors="pt")["input_ids"]
        assert ids.shape[1] <= 8
        with torch.no_grad():
            _, cache = small_model.run_with_cache(ids)
        torch.testing.assert_close(found[row], cache[HOOK][0, -1])


def test_a_data_set_is_read_once_and_the_tokenizer_left_as_it_was(
    small_model: HookedSAETransformer,
    dataset: str,
    folder: Path,
):
    tokenizer: Any = small_model.tokenizer
    assert tokenizer.truncation_side == "right"
    (file,) = files(folder)
    os.utime(file, (0, 0))
    cache_activations(small_model, HOOK, [dataset], folder, 8, "cpu")
    assert file.stat().st_mtime == 0


def test_a_full_disk_leaves_no_part_of_a_file(
    small_model: HookedSAETransformer, dataset: str, tmp_path: Path
):
    with files_no_larger_than(10_000), pytest.raises((OSError, RuntimeError)):
        cache_activations(small_model, HOOK, [dataset], tmp_path, 8, "cpu")
    assert files(tmp_path) == []
    assert missing_activations([dataset], HOOK, tmp_path) == [dataset]
    tokenizer: Any = small_model.tokenizer
    assert tokenizer.truncation_side == "right"


def test_a_tokenizer_that_cannot_pad_is_refused(
    small_model: HookedSAETransformer,
    dataset: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    tokenizer: Any = copy.deepcopy(small_model.tokenizer)
    tokenizer.pad_token = None
    monkeypatch.setattr(small_model, "tokenizer", tokenizer)
    with pytest.raises(ValueError, match="must have a padding token"):
        cache_activations(small_model, HOOK, [dataset], tmp_path, 8, "cpu")


@pytest.fixture(scope="module")
def identity() -> StandardSAE:
    """SAE whose 18 latents are the numbers of its input, where these are positive."""
    sae = StandardSAE(
        StandardSAEConfig(d_in=18, d_sae=18, normalize_activations="none")
    )
    for weights in (sae.W_enc, sae.W_dec):
        weights.data = torch.eye(18)
    return sae


def plant(file: Path, dataset: str, concepts: int) -> None:
    """Write activations of which some numbers are the text's class, the others noise."""
    y = torch.tensor(utils_data.get_yvals(dataset)).float()
    x = torch.rand(len(y), 18, generator=torch.Generator().manual_seed(0))
    # Each of them tells a part of one class from the rest.
    for i in range(concepts):
        part = (torch.arange(len(y)) % concepts == i).float()
        x[:, 2 * i] = y * part
    torch.save(x, file)


@pytest.mark.parametrize("concepts", [0, 4])
def test_probes_find_a_concept_with_as_many_latents_as_it_has(
    concepts: int,
    identity: StandardSAE,
    dataset: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    (file,) = files(folder)
    planted = tmp_path / file.relative_to(folder)
    planted.parent.mkdir()
    plant(planted, dataset, concepts)
    found = sparse_probing(identity, HOOK, dataset, tmp_path)
    assert capsys.readouterr().out == ""
    assert list(found) == ["1", "5", "16"]
    least = {0: (0, 0, 0), 4: (0.55, 1, 1)}[concepts]
    most = {0: (0.65, 0.65, 0.65), 4: (0.75, 1, 1)}[concepts]
    for low, auc, high in zip(least, found.values(), most, strict=True):
        assert low - 1e-6 <= auc <= high + 1e-6


def test_missing_activations_are_no_reason_to_look_for_a_model(
    identity: StandardSAE, dataset: str, tmp_path: Path
):
    with pytest.raises(FileNotFoundError, match=f"{dataset}.* is missing"):
        sparse_probing(identity, HOOK, dataset, tmp_path)

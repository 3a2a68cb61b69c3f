"""Token ids and other numbers, in whatever they come."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from sae_lens import HookedSAETransformer

from sae_lens_scale.analysis.corpus import (
    chosen_latents,
    excluded_ids,
    require_integer,
    require_number,
    to_tensor,
    token_batches,
)

IDS = [[5, 6, 7], [8, 9, 1]]


def saved(ids: list[list[int]], folder: Path) -> np.ndarray:
    """The ids in a file that is mapped to memory and cannot be written."""
    np.save(folder / "ids.npy", np.array(ids, dtype=np.uint16))
    return np.load(folder / "ids.npy", mmap_mode="r")


@pytest.mark.filterwarnings("error")
def test_batches_are_read_from_tensors_arrays_and_lists_alike(tmp_path: Path):
    batches: list[Any] = [
        torch.tensor(IDS),
        torch.tensor(IDS, dtype=torch.int32),
        IDS,
        tuple(map(tuple, IDS)),
        np.array(IDS),
        list(torch.tensor(IDS)),
        saved(IDS, tmp_path),
    ]
    found = list(token_batches(iter(batches), None))
    assert len(found) == len(batches)
    for batch in found:
        assert batch.dtype == torch.int64
        assert batch.tolist() == IDS
    (whole,) = token_batches(np.array([IDS]), 3)  # type: ignore[arg-type]
    assert whole.tolist() == IDS
    assert len(list(token_batches(batches, 2))) == 2


@pytest.mark.parametrize(
    ("tokens", "got"),
    [
        (Dataset.from_dict({"tokens": IDS}), r"got \{'tokens': \[5, 6, 7\]\}"),
        (Dataset.from_dict({"tokens": IDS})["tokens"], r"torch.int64 of shape \(3,\)"),
        (IDS, r"torch.int64 of shape \(3,\)"),
        (torch.tensor(IDS), r"torch.int64 of shape \(3,\)"),
        ([[IDS[0], IDS[1][:2]]], r"got \[\[5, 6, 7\], \[8, 9\]\]"),
        ([[]], r"of shape \(0,\)"),
        (["ab"], "got 'ab'"),
        ([None], "got None"),
        (None, "got None"),
        (7, "got 7"),
        ([torch.ones(2, 3)], "torch.float32"),
        ([np.ones((2, 3)) > 0], "torch.bool"),
        ([[[5, -100]]], "at least 0, got -100"),
    ],
)
def test_what_are_no_batches_of_token_ids_is_refused(tokens: Any, got: str):
    with pytest.raises(ValueError, match=f"^tokens must be .*{got}") as error:
        list(token_batches(tokens, None))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("max_batches", [0, -1, 2.5, True, "2"])
def test_a_number_of_batches_is_a_positive_integer(max_batches: Any):
    with pytest.raises(ValueError, match="max_batches must be .* got"):
        list(token_batches([IDS], max_batches))


@pytest.mark.parametrize(
    "given",
    [
        [4, 0],
        (4, 0),
        {4, 0},
        range(0, 5, 4),
        iter([4, 0]),
        np.array([4, 0], dtype=np.uint8),
        torch.tensor([4, 0]),
        pd.Series([4, 0], index=[7, 9]),
        [torch.tensor(4), np.int64(0)],
    ],
)
def test_excluded_ids_may_come_in_anything_that_holds_integers(
    tiny_model: HookedSAETransformer, given: Any
):
    found = excluded_ids(tiny_model, given)
    assert found.dtype == torch.int64
    assert sorted(found.tolist()) == [0, 4]


def test_a_single_excluded_id_and_truth_values_of_numpy_count(
    tiny_model: HookedSAETransformer,
):
    assert excluded_ids(tiny_model, np.array([0])).tolist() == [0]
    truths: list[Any] = [True, np.True_]
    for true in truths:
        # SmolLM2's BOS and EOS.
        assert sorted(excluded_ids(tiny_model, true).tolist()) == [1, 2]
    nothing: list[Any] = [False, np.False_, [], np.array([])]
    for none in nothing:
        assert excluded_ids(tiny_model, none).tolist() == []


@pytest.mark.parametrize(
    "given",
    [
        None,
        7,
        "1",
        [1.0],
        ["1"],
        [None],
        [[1]],
        np.array([1.5]),
        np.array(1),
        torch.tensor(1),
        torch.tensor([True, False]),
        [torch.tensor(True)],
        {"a": 1},
    ],
)
def test_what_holds_no_integers_is_refused(
    tiny_model: HookedSAETransformer, given: Any
):
    message = "exclude_special_tokens must be a list of integers, got "
    with pytest.raises(ValueError, match=message) as error:
        excluded_ids(tiny_model, given)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="latents must be a list of integers, got "):
        chosen_latents(given, 10)


def test_latents_keep_their_order_and_must_exist_once():
    assert chosen_latents(reversed(range(4)), 4) == [3, 2, 1, 0]
    assert chosen_latents(np.array([63]), 64) == [63]
    with pytest.raises(
        ValueError, match=r"range\(4\), got \[0, 1, 2, 3, 4, 5, \.\.\.\]"
    ):
        chosen_latents(range(1_000), 4)
    with pytest.raises(ValueError, match=r"at least one .* got \[\]"):
        chosen_latents(iter([]), 4)
    with pytest.raises(ValueError, match=r"none twice, got \[2, 2\]"):
        chosen_latents(np.array([2, 2]), 4)


def test_integers_of_numpy_are_integers():
    assert type(require_integer("n", np.int32(3), 3)) is int
    for value, message in ((2, "at least 3, got 2"), (3.0, "an integer, got 3.0")):
        with pytest.raises(ValueError, match=f"n must be {message}"):
            require_integer("n", value, 3)


@pytest.mark.parametrize(
    "value", [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2)]
)
def test_numbers_may_be_of_any_type(value: Any):
    found = require_number("k", value)
    assert (type(found), found) == (float, 0.5)


@pytest.mark.parametrize(
    "value", ["0.5", None, True, 1j, [0.5], np.array([0.5, 1]), torch.tensor(True)]
)
def test_a_value_that_is_no_number_is_refused(value: Any):
    with pytest.raises(ValueError, match="k must be a number, got "):
        require_number("k", value)


def test_tensors_of_lists_are_on_the_CPU_whatever_the_default_device():
    with torch.device("meta"):
        assert to_tensor("x", [1, 2]).device.type == "cpu"

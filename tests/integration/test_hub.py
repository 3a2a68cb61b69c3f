"""Sharing SAEs through a model hub, with the real ``huggingface_hub`` client."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import scale_sae, switch_sae
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from integration.hub import Hub
from integration.runs import TrainingRun, assert_computes_the_same
from sae_lens import SAE, TrainingSAE, upload_saes_to_huggingface
from sae_lens.loading.pretrained_saes_directory import (
    PretrainedSAELookup,
    get_pretrained_saes_directory,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

from sae_lens_scale import ScaleSAE, SwitchSAE

REPO = "lab/saes"
X = torch.randn(40, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
# Activations for the SAEs of the runs.
ACTS = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
every_kind = pytest.mark.parametrize(
    "make",
    [
        pytest.param(scale_sae, id="scale"),
        pytest.param(partial(scale_sae, decomposition="learned"), id="learned"),
        pytest.param(switch_sae, id="switch"),
    ],
)
FILES = ["cfg.json", "sae_weights.safetensors", "sparsity.safetensors"]


def assert_same(loaded: SAE[Any], expected: SAE[Any]) -> None:
    """Equal in class, config, metadata and, bit by bit, in weights."""
    assert type(loaded) is type(expected)
    assert loaded.cfg.to_dict() == expected.cfg.to_dict()
    torch.testing.assert_close(
        loaded.state_dict(), expected.state_dict(), atol=0, rtol=0
    )


def assert_equivalent(loaded: SAE[Any], trained: SAE[Any]) -> None:
    """The same numbers up to rounding in float64."""
    assert_computes_the_same(loaded, trained, X, atol=1e-9, rtol=1e-9)


@pytest.fixture
def published(training_run: TrainingRun, hub: Hub) -> TrainingRun:
    """A finished run whose export is on the hub as "a"."""
    hub.put(REPO, training_run.output, "a")
    return training_run


def test_from_pretrained_gives_what_the_runner_exported_asking_the_hub_once(
    training_run: TrainingRun, hub: Hub
):
    folder = training_run.output
    hub.put(REPO, folder, "blocks.0/resid")
    on_disk = json.loads((folder / "cfg.json").read_text())
    sparsity = load_file(folder / "sparsity.safetensors")["sparsity"]
    for time in ("downloaded", "from the cache", "without the hub"):
        if time == "without the hub":
            hub.stop()
        loaded, cfg_dict, log_sparsity = SAE.from_pretrained_with_cfg_and_sparsity(
            REPO, "blocks.0/resid"
        )
        assert_same(loaded, SAE.load_from_disk(folder))
        assert loaded.cfg.metadata.hook_name == training_run.cfg.hook_name
        assert cfg_dict["metadata"] == on_disk["metadata"]
        assert log_sparsity is not None
        assert torch.equal(log_sparsity, sparsity)
        assert hub.downloads() == FILES
        torch.testing.assert_close(loaded(ACTS), training_run.sae(ACTS))


def test_missing_repositories_SAEs_and_files_are_named(
    published: TrainingRun, hub: Hub
):
    with pytest.raises(EntryNotFoundError, match=f"{REPO}.*/blocks.7/cfg.json"):
        SAE.from_pretrained(REPO, "blocks.7")
    with pytest.raises(RepositoryNotFoundError, match="lab/typo"):
        SAE.from_pretrained("lab/typo", "a")
    del hub.repos[REPO]["a/sae_weights.safetensors"]
    with pytest.raises(EntryNotFoundError, match="a/sae_weights.safetensors"):
        SAE.from_pretrained(REPO, "a")


@pytest.mark.parametrize("where", ["on the hub", "on the way"])
def test_truncated_weights_are_an_error_until_they_are_whole(
    where: str, published: TrainingRun, hub: Hub
):
    path = "a/sae_weights.safetensors"
    whole = hub.repos[REPO][path]
    if where == "on the hub":
        hub.repos[REPO][path] = whole[: len(whole) // 2]
        with pytest.raises(SafetensorError, match="[Ii]ncomplete"):
            SAE.from_pretrained(REPO, "a")
        hub.repos[REPO][path] = whole
    else:
        hub.cut.add(path)
        with pytest.raises(OSError, match=f"should be of size {len(whole)}"):
            SAE.from_pretrained(REPO, "a")
        hub.cut.clear()
    expected = SAE.load_from_disk(published.output)
    assert_same(SAE.from_pretrained(REPO, "a"), expected)


def test_force_download_replaces_a_damaged_cache(
    published: TrainingRun, hub: Hub, tmp_path: Path
):
    first = SAE.from_pretrained(REPO, "a")
    (cached,) = (tmp_path / "client").rglob("sae_weights.safetensors")
    blob = cached.resolve()
    # A new file, since the loaded SAE is a memory map of the old one.
    blob.unlink()
    blob.write_bytes(b"damaged")
    with pytest.raises(SafetensorError):
        SAE.from_pretrained(REPO, "a")
    assert_same(SAE.from_pretrained(REPO, "a", force_download=True), first)
    assert hub.downloads() == [*FILES, *FILES]


def test_uploaded_SAEs_load_as_they_were(training_run: TrainingRun, hub: Hub):
    live = SAE.load_from_disk(training_run.output)
    upload_saes_to_huggingface(
        {"live": live, "runs/0": training_run.output, "runs/1": training_run.final},
        REPO,
        show_progress=False,
    )
    for sae_id in ("live", "runs/0"):
        assert_same(SAE.from_pretrained(REPO, sae_id), live)
    files = hub.repos[REPO]
    # The optimizer and whatever else a checkpoint holds stay at home.
    assert files.keys() == {"README.md"} | {
        *(f"live/{name}" for name in FILES[:2]),
        *(f"runs/0/{name}" for name in [*FILES, "runner_cfg.json"]),
        *(f"runs/1/{name}" for name in [*FILES, "runner_cfg.json"]),
    }
    assert (
        files["runs/0/runner_cfg.json"]
        == (training_run.output / "runner_cfg.json").read_bytes()
    )
    # A training checkpoint is one file format more, not another SAE.
    from_checkpoint = SAE.from_pretrained(REPO, "runs/1")
    assert type(from_checkpoint) is type(live)
    torch.testing.assert_close(from_checkpoint(ACTS), live(ACTS))


@every_kind
def test_a_training_SAE_loads_for_inference_and_for_training_in_any_dtype(
    make: Any, hub: Hub, tmp_path: Path
):
    sae = make()
    upload_saes_to_huggingface({"a": sae}, REPO, show_progress=False)
    loaded = SAE.from_pretrained(REPO, "a", dtype="float64")
    assert isinstance(loaded, (ScaleSAE, SwitchSAE))
    assert_equivalent(loaded, sae)
    assert_same(TrainingSAE.from_pretrained(REPO, "a", dtype="float64"), sae)
    sae.save_inference_model(tmp_path)
    hub.put(REPO, tmp_path, "export")
    for dtype in ("float32", "bfloat16"):
        loaded = SAE.from_pretrained(REPO, "export", dtype=dtype)
        assert_same(loaded, SAE.load_from_disk(tmp_path, dtype=dtype))
        assert {str(p.dtype) for p in loaded.parameters()} == {f"torch.{dtype}"}


@torch.no_grad()
@every_kind
def test_a_listed_release_gets_its_activation_norm_folded_router_included(
    make: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    sae = make(normalize_activations="expected_average_only_in")
    upload_saes_to_huggingface({"layer_0/a": sae}, REPO, show_progress=False)
    # An entry as in SAELens's pretrained_saes.yaml.
    release = PretrainedSAELookup(
        release="listed",
        repo_id=REPO,
        model="tiny",
        conversion_func=None,
        saes_map={"a": "layer_0/a"},
        expected_var_explained={},
        expected_l0={},
        neuronpedia_id={},
        norm_scaling_factor={"a": 2.5},
        config_overrides=None,
    )
    monkeypatch.setitem(get_pretrained_saes_directory(), "listed", release)
    loaded = SAE.from_pretrained("listed", "a", dtype="float64")
    assert loaded.cfg.normalize_activations == "none"
    raw = X / 2.5
    torch.testing.assert_close(loaded(raw), sae(X) / 2.5, atol=1e-9, rtol=1e-9)
    assert torch.equal(loaded.route(raw).indices, sae.route(X).indices)  # type: ignore[operator]

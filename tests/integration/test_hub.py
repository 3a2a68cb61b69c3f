"""Sharing SAEs through a model hub, with the real ``huggingface_hub`` client."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import scale_sae, switch_sae
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from integration.hub import Hub, client_settings
from integration.training_run import TrainingRun
from sae_lens import SAE, TrainingSAE, upload_saes_to_huggingface
from sae_lens.loading.pretrained_saes_directory import (
    PretrainedSAELookup,
    get_pretrained_saes_directory,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

from sae_lens_scale import (
    ScaleSAE,
    ScaleTrainingSAE,
    SwitchSAE,
    SwitchTrainingSAE,
)
from sae_lens_scale.loading import authors_huggingface_loader

REPO = "lab/saes"
X = torch.randn(40, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MIXTURES = [
    pytest.param(scale_sae, id="scale"),
    pytest.param(lambda **o: scale_sae(decomposition="learned", **o), id="learned"),
    pytest.param(switch_sae, id="switch"),
]
FILES = ["cfg.json", "sae_weights.safetensors", "sparsity.safetensors"]


def assert_same(loaded: SAE[Any], expected: SAE[Any]) -> None:
    """Equal in class, config, metadata and, bit by bit, in weights."""
    assert type(loaded) is type(expected)
    assert loaded.cfg.to_dict() == expected.cfg.to_dict()
    want = expected.state_dict()
    assert loaded.state_dict().keys() == want.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == want[name].dtype
        assert torch.equal(tensor, want[name]), name


@torch.no_grad()
def assert_computes_what(loaded: SAE[Any], trained: SAE[Any]) -> None:
    acts = trained.encode(X)
    assert acts.any()
    torch.testing.assert_close(loaded.encode(X), acts, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(loaded(X), trained(X), atol=1e-9, rtol=1e-9)


def test_from_pretrained_gives_what_the_runner_exported(
    training_run: TrainingRun, hub: Hub
):
    hub.put(REPO, training_run.output, "blocks.0/resid")
    loaded, cfg_dict, log_sparsity = SAE.from_pretrained_with_cfg_and_sparsity(
        REPO, "blocks.0/resid"
    )
    assert_same(loaded, SAE.load_from_disk(training_run.output))
    assert loaded.cfg.metadata.hook_name == training_run.cfg.hook_name
    on_disk = json.loads((training_run.output / "cfg.json").read_text())
    assert cfg_dict["metadata"] == on_disk["metadata"]
    assert log_sparsity is not None
    want = load_file(training_run.output / "sparsity.safetensors")["sparsity"]
    assert torch.equal(log_sparsity, want)
    assert hub.downloads() == FILES
    acts = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(acts), training_run.sae(acts))


@pytest.mark.parametrize("make", MIXTURES)
def test_from_pretrained_loads_in_the_dtype_that_is_asked_for(
    make: Any, hub: Hub, tmp_path: Path
):
    sae = make()
    sae.save_inference_model(tmp_path / "export")
    hub.put(REPO, tmp_path / "export", "a")
    assert_computes_what(SAE.from_pretrained(REPO, "a", dtype="float64"), sae)
    for dtype in ("float32", "bfloat16"):
        loaded = SAE.from_pretrained(REPO, "a", dtype=dtype)
        assert_same(loaded, SAE.load_from_disk(tmp_path / "export", dtype=dtype))
        assert {str(p.dtype) for p in loaded.parameters()} == {f"torch.{dtype}"}


def test_from_pretrained_folds_decoder_norms_on_request(hub: Hub, tmp_path: Path):
    sae = scale_sae()
    sae.save_model(tmp_path / "checkpoint")
    hub.put(REPO, tmp_path / "checkpoint", "a")
    loaded = SAE.from_pretrained(REPO, "a", dtype="float64", fold_W_dec_norm=True)
    torch.testing.assert_close(
        loaded.W_dec.norm(dim=-1), torch.ones(60, dtype=torch.float64)
    )
    assert_computes_what(loaded, sae)


def test_what_is_not_on_the_hub_is_named_in_the_error(
    training_run: TrainingRun, hub: Hub
):
    hub.put(REPO, training_run.output, "a")
    with pytest.raises(EntryNotFoundError, match=f"{REPO}.*/blocks.7/cfg.json"):
        SAE.from_pretrained(REPO, "blocks.7")
    with pytest.raises(RepositoryNotFoundError, match="lab/typo"):
        SAE.from_pretrained("lab/typo", "a")
    del hub.repos[REPO]["a/sae_weights.safetensors"]
    with pytest.raises(EntryNotFoundError, match="a/sae_weights.safetensors"):
        SAE.from_pretrained(REPO, "a")


@pytest.mark.parametrize("where", ["on the hub", "on the way"])
def test_truncated_weights_are_an_error_until_they_are_whole(
    where: str, training_run: TrainingRun, hub: Hub
):
    hub.put(REPO, training_run.output, "a")
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
    expected = SAE.load_from_disk(training_run.output)
    assert_same(SAE.from_pretrained(REPO, "a"), expected)


def test_what_was_downloaded_loads_again_without_the_hub(
    training_run: TrainingRun, hub: Hub
):
    hub.put(REPO, training_run.output, "a")
    first, _, sparsity = SAE.from_pretrained_with_cfg_and_sparsity(REPO, "a")
    SAE.from_pretrained(REPO, "a")
    assert hub.downloads() == FILES
    hub.stop()
    again, _, cached_sparsity = SAE.from_pretrained_with_cfg_and_sparsity(REPO, "a")
    assert_same(again, first)
    assert sparsity is not None
    assert cached_sparsity is not None
    assert torch.equal(cached_sparsity, sparsity)


def test_force_download_replaces_a_damaged_cache(
    training_run: TrainingRun, hub: Hub, tmp_path: Path
):
    hub.put(REPO, training_run.output, "a")
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
    # What else a checkpoint's folder holds, such as the optimizer, stays at home.
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
    acts = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    from_checkpoint = SAE.from_pretrained(REPO, "runs/1")
    assert type(from_checkpoint) is type(live)
    torch.testing.assert_close(from_checkpoint(acts), live(acts))


@pytest.mark.parametrize("make", MIXTURES)
def test_an_uploaded_training_SAE_loads_for_inference_and_for_training(
    make: Any, hub: Hub
):
    sae = make()
    upload_saes_to_huggingface({"a": sae}, REPO, show_progress=False)
    loaded = SAE.from_pretrained(REPO, "a", dtype="float64")
    assert isinstance(loaded, (ScaleSAE, SwitchSAE))
    assert_computes_what(loaded, sae)
    assert_same(TrainingSAE.from_pretrained(REPO, "a", dtype="float64"), sae)


@torch.no_grad()
@pytest.mark.parametrize("make", MIXTURES)
def test_a_listed_release_gets_its_activation_norm_folded_router_included(
    make: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch
):
    sae = make(normalize_activations="expected_average_only_in")
    upload_saes_to_huggingface({"layer_0/a": sae}, REPO, show_progress=False)
    # As an entry of SAELens's pretrained_saes.yaml would have it.
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


def authors_switch_checkpoint(sae: SwitchTrainingSAE) -> dict[str, torch.Tensor]:
    """The SAE as Mudide et al.'s code would have saved it."""
    return {
        "encoder.weight": sae.W_enc.T,
        "decoder": sae.W_dec,
        "router.weight": sae.W_router.T,
        "b_dec": sae.b_dec,
        "b_router": sae.b_router,
    }


def authors_scale_checkpoint(sae: ScaleTrainingSAE) -> dict[str, torch.Tensor]:
    """The SAE as the Scale SAE authors' code would have saved it."""
    assert sae.omega is not None
    assert sae.W_low_pass is not None
    state = {
        "b_dec": sae.b_dec,
        "b_gate": sae.b_router,
        "gate.weight": sae.W_router.T,
        "gate.bias": torch.zeros(sae.cfg.num_experts),
        "omega": sae.omega,
        "beta": torch.zeros(sae.cfg.num_experts),
        "lp_transform_encoder.weight": sae.W_low_pass,
        "lp_transform_decoder.weight": torch.eye(sae.cfg.d_in),
    }
    for i, latents in enumerate(torch.arange(sae.cfg.d_sae).chunk(sae.cfg.num_experts)):
        state[f"expert_modules.{i}.encoder.weight"] = sae.W_enc.T[latents]
        state[f"expert_modules.{i}.encoder.bias"] = sae.b_enc[latents]
        state[f"expert_modules.{i}.decoder"] = sae.W_dec[latents]
    return state


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["scale", "switch"])
@pytest.mark.parametrize("with_config", [True, False])
def test_a_checkpoint_of_the_authors_code_loads_from_the_hub(
    architecture: str, with_config: bool, hub: Hub, tmp_path: Path
):
    as_theirs: dict[str, Any] = {
        "topk_over": "gated_activations",
        "rescale_acts_by_decoder_norm": False,
    }
    if architecture == "scale":
        sae = scale_sae(decomposition="learned", gate="double_softmax", **as_theirs)
        state = authors_scale_checkpoint(sae)
    else:
        sae = switch_sae(gate="softmax", **as_theirs)
        sae.b_enc.zero_()
        state = authors_switch_checkpoint(sae)
    experts = sae.cfg.experts_per_token
    torch.save({name: t.detach() for name, t in state.items()}, tmp_path / "ae.pt")
    converter: Any = authors_huggingface_loader
    if with_config:
        trainer = {"k": 6, "e": experts, "heaviside": False, "layer": 8}
        (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    else:
        converter = partial(converter, k=6, experts_per_token=experts, heaviside=False)
    hub.put(REPO, tmp_path, "dictionaries/8")
    loaded = SAE.from_pretrained(
        REPO, "dictionaries/8", dtype="float64", converter=converter
    )
    assert_computes_what(loaded, sae)
    hook_name = "blocks.8.hook_resid_post" if with_config else None
    assert loaded.cfg.metadata.hook_name == hook_name
    # From then on it is an SAE as any other.
    upload_saes_to_huggingface({"converted": loaded}, REPO, show_progress=False)
    assert_same(SAE.from_pretrained(REPO, "converted", dtype="float64"), loaded)


SCRIPT = """
import sys
from pathlib import Path

import sae_lens_scale
import torch
from sae_lens import SAE, upload_saes_to_huggingface

folder = Path(sys.argv[1])
exports = {name: folder / name for name in ("scale", "switch")}
upload_saes_to_huggingface(exports, "lab/saes", show_progress=False)
x = torch.load(folder / "x.pt")
saes = [SAE.from_pretrained("lab/saes", name, dtype="float64") for name in exports]
torch.save([sae(x) for sae in saes], folder / "out.pt")
"""


@torch.no_grad()
def test_a_fresh_process_uploads_and_loads(hub: Hub, tmp_path: Path):
    saes = {"scale": scale_sae(), "switch": switch_sae()}
    for name, sae in saes.items():
        sae.save_inference_model(tmp_path / name)
    torch.save(X, tmp_path / "x.pt")
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={**os.environ, **client_settings(hub, tmp_path / "another client")},
        check=True,
        timeout=120,
    )
    outputs = torch.load(tmp_path / "out.pt")
    for output, sae in zip(outputs, saes.values(), strict=True):
        torch.testing.assert_close(output, sae(X), atol=1e-9, rtol=1e-9)
    assert sorted(set(hub.downloads())) == FILES[:2]

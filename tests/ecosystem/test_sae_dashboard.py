"""SAEs in SAEDashboard: its pages and its files for Neuronpedia."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem.gpt2_saes import HOOK, N_LATENTS, export
from integration import gpt2
from integration.runs import both_architectures
from sae_lens import HookedSAETransformer
from sae_lens.saes.sae import SAE

from sae_lens_scale.cli import main

# Only the environment of these tests has them.
sae_vis_data: Any = import_module("sae_dashboard.sae_vis_data")
sae_vis_runner: Any = import_module("sae_dashboard.sae_vis_runner")
data_writing: Any = import_module("sae_dashboard.data_writing_fns")

pytestmark = pytest.mark.usefixtures("hub_with_gpt2")


@both_architectures
def test_a_page_shows_what_the_SAE_computes_and_leaves_it_as_it_was(
    architecture: str, tmp_path: Path
):
    sae = SAE.load_from_disk(export(architecture, tmp_path / "sae"))
    model = HookedSAETransformer.from_pretrained(gpt2.MODEL)
    tokens = torch.randint(0, 400, (8, 16))
    _, cache = model.run_with_cache(tokens, names_filter=HOOK)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    with torch.no_grad():
        acts, out = sae.encode(cache[HOOK]), sae(cache[HOOK])
    latents = acts.flatten(0, 1).amax(0).topk(4).indices.tolist()

    cfg = sae_vis_data.SaeVisConfig(
        hook_point=HOOK, features=latents, minibatch_size_tokens=4
    )
    data = sae_vis_runner.SaeVisRunner(cfg).run(sae, model, tokens)
    page = tmp_path / "page.html"
    data_writing.save_feature_centric_vis(data, filename=page)

    assert all(f'"{latent}"' in page.read_text() for latent in latents)
    maxima = acts[..., latents].flatten(0, 1).amax(0)
    shown = torch.tensor(data.feature_stats.max)
    torch.testing.assert_close(shown, maxima, atol=1e-3, rtol=1e-4)
    # Folded again, decoder norms that are 1 already may round otherwise.
    torch.testing.assert_close(dict(sae.state_dict()), before)
    with torch.no_grad():
        torch.testing.assert_close(sae(cache[HOOK]), out, atol=1e-3, rtol=1e-4)


@both_architectures
def test_files_for_Neuronpedia(
    architecture: str,
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    folder = export(architecture, tmp_path / "sae")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    command = (
        "run -m sae_dashboard.neuronpedia.neuronpedia_runner --from-local-sae "
        f"--sae-path {folder} --sae-set scale --np-set-name scale --output-dir out "
        f"--dataset-path {text_folder} --n-prompts 16 --n-tokens-in-prompt 16 "
        f"--n-prompts-in-forward-pass 8 --n-features-per-batch {N_LATENTS}"
    )
    assert main(command.split()) == 0
    (batch,) = Path("out").glob("*/batch-0.json")
    result = json.loads(batch.read_text())
    assert result["model_id"] == gpt2.MODEL
    features = result["features"]
    assert [feature["feature_index"] for feature in features] == list(range(N_LATENTS))
    assert any(
        max(sequence["values"]) > 0
        for feature in features
        for sequence in feature["activations"]
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

"""The code of docs/ecosystem.md runs, as far as its tools are installed."""

import json
import shlex
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ecosystem.gpt2_saes import N_LATENTS, export
from pages import run_python, snippets
from sae_lens.saes.sae import SAE

from sae_lens_scale.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "ecosystem.md"


@pytest.fixture
def sent_to_neuronpedia(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Address and content of each request; answered as Neuronpedia does, offline."""
    sent: list[tuple[str, Any]] = []

    def answer(
        method: str, url: str, headers: dict[str, str], json: Any
    ) -> SimpleNamespace:
        assert (method, headers["X-Api-Key"]) == ("POST", "a-key")
        endpoint = url.removeprefix("https://neuronpedia.org/api/")
        sent.append((endpoint, json))
        content: dict[str, Any] = {}
        if endpoint == "source-set/new":
            sources = [
                {
                    "id": f"{layer}-{json['name']}",
                    "modelId": json["modelId"],
                    "setName": json["name"],
                }
                for layer in range(12)
            ]
            content = {**json, "urls": [""], "sources": sources}
        return SimpleNamespace(
            status_code=200, raise_for_status=lambda: None, json=lambda: content
        )

    if find_spec("neuronpedia") is not None:
        client = import_module("neuronpedia.requests.base_request")
        monkeypatch.setattr(client, "requests", SimpleNamespace(request=answer))
        monkeypatch.setenv("NEURONPEDIA_API_KEY", "a-key")
    return sent


@pytest.mark.usefixtures("hub_with_spelling_gpt2", "absorption_folder")
def test_the_code_of_the_page_runs(
    text_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sent_to_neuronpedia: list[tuple[str, Any]],
):
    monkeypatch.chdir(tmp_path)
    export("scale", Path("scale"))
    Path("corpus").symlink_to(text_folder)
    # Before the code that reads its files.
    for _, text in snippets(PAGE, "bash"):
        arguments = shlex.split(text.replace("\\\n", " "))
        if find_spec(arguments[3].partition(".")[0]) is not None:
            assert main(arguments[1:]) == 0
    namespace: dict[str, Any] = {}
    run_python(PAGE, namespace)
    clean = namespace["model"](namespace["tokens"]).logits
    for changed in {"logits", "steered"} & namespace.keys():
        assert not clean.equal(namespace[changed])
    if "source_set" in namespace:
        _check_upload(sent_to_neuronpedia)
        metadata = SAE.load_from_disk("scale").cfg.metadata
        assert metadata.neuronpedia_id == "gpt2-small/1-scale-res-64"


def _check_upload(sent: list[tuple[str, Any]]) -> None:
    """
    Check requests by the rules that Neuronpedia's server has for them.

    They are in its repository (August 2026), in the files
    ``apps/webapp/app/api/{source-set/new,feature/upload-batch}/route.tsx``.
    """
    (endpoint, source_set), *uploads = sent
    assert endpoint == "source-set/new"
    assert source_set["name"] == "scale-res-64"
    assert len(source_set["description"]) <= 128
    indices: list[int] = []
    for endpoint, batch in uploads:
        assert endpoint == "feature/upload-batch"
        assert (batch["modelId"], batch["source"]) == ("gpt2-small", "1-scale-res-64")
        assert 1 <= len(batch["features"]) <= 128
        for feature in batch["features"]:
            indices.append(feature["index"])
            assert 0 < feature["density"] <= 1
            for logits in (feature["topLogits"], feature["bottomLogits"]):
                assert 1 <= len(logits) <= 20
                assert all(logit["token"] for logit in logits)
            assert feature["activations"]
            for text in feature["activations"]:
                assert len(text["tokens"]) == len(text["values"])
                assert 1 <= len(text["tokens"]) <= 1024
                assert all(text["tokens"])
                assert max(text["values"]) > 0
                fraction = text["quantileFraction"]
                assert fraction is None or 0 <= fraction <= 1
    fired = [
        latent["feature_index"]
        for file in Path("neuronpedia").glob("*/batch-*.json")
        for latent in json.loads(file.read_text())["features"]
        if latent["frac_nonzero"] > 0
    ]
    assert len(fired) > N_LATENTS / 2
    assert sorted(indices) == sorted(fired)

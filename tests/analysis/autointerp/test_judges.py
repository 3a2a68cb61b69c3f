"""Judges: a local model, all the way through delphi, and OpenAI's protocol."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import torch
from helpers import small_corpus
from openai import AuthenticationError
from sae_lens import HookedSAETransformer
from sae_lens.training.activations_store import ActivationsStore
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_lens_scale.analysis.autointerp import (
    AutointerpSettings,
    autointerp,
    local_judge,
    openai_judge,
)
from sae_lens_scale.analysis.contexts import latent_activations
from sae_lens_scale.loading.smollm2 import smollm2_folder


@pytest.mark.usefixtures("delphi")
def test_a_weak_real_judge_goes_all_the_way(
    smollm2: HookedSAETransformer, make_sae: Any
):
    settings = {"d_in": 576, "d_sae": 1_152, "num_experts": 8, "k": 32}
    sae = make_sae(hook="blocks.2.hook_resid_post", **settings)
    sae.cfg.metadata.context_size = 64
    store = ActivationsStore.from_sae(smollm2, sae, small_corpus())
    batches = [store.get_batch_tokens() for _ in range(4)]
    stream = latent_activations(smollm2, sae, batches, range(1_152))
    acts = torch.cat([part.reshape(-1, 16, 1_152) for _, part in stream])
    fires = (acts.amax(1) > 0).sum(0)
    latents = ((fires >= 8) & (fires < 100)).nonzero().flatten()[:2].tolist()

    folder = smollm2_folder()
    weak: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    smollm2_says = local_judge(weak.float(), tokenizer, max_new_tokens=16)
    explanations = []

    def judge(messages: list[dict[str, str]]) -> str:
        reply = smollm2_says(messages)
        if "[EXPLANATION]" in messages[0]["content"]:
            explanations.append(reply)
        # A better judge writes the mark itself.
        return reply if "[EXPLANATION]:" in reply else f"[EXPLANATION]: {reply}"

    settings = AutointerpSettings(
        passage_length=16,
        n_quantiles=3,
        passages_per_quantile=1,
        non_activating=2,
        explained_passages=3,
        min_passages=8,
    )
    result = autointerp(smollm2, sae, batches, latents, judge, settings, verbose=False)
    assert [one.latent for one in result.latents] == latents
    assert result.passages == len(acts)
    for one, reply in zip(result.latents, explanations, strict=True):
        assert one.explanation in reply
        for scores in (one.detection, one.fuzzing):
            assert scores.asked == [2, 1, 1, 1]
            assert scores.answered in ([2, 1, 1, 1], [0] * 4)


class Endpoint(BaseHTTPRequestHandler):
    """Speaks OpenAI's protocol, and fails on every first request."""

    seen: list[dict[str, Any]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers["Authorization"]
        self.seen.append(body | {"path": self.path})
        if key != "Bearer secret":
            status, reply = 401, {"error": {"message": "wrong key"}}
        elif len(self.seen) == 1:
            status, reply = 503, {"error": {"message": "busy"}}
        else:
            message = {"role": "assistant", "content": "[1, 0]"}
            status, reply = 200, {"choices": [{"index": 0, "message": message}]}
        payload = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Endpoint, "seen", [])
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_endpoint_is_asked_as_openai_defines_it(endpoint: str):
    judge = openai_judge("llama", endpoint, "secret", max_tokens=7)
    messages = [{"role": "user", "content": "Hello"}]
    assert judge(messages) == "[1, 0]"
    want = {
        "model": "llama",
        "messages": messages,
        "temperature": 0.0,
        "max_tokens": 7,
        "path": "/v1/chat/completions",
    }
    # The first request met a busy endpoint.
    assert Endpoint.seen == [want, want]
    assert openai_judge("llama", endpoint, "secret", temperature=None)(messages)
    assert "temperature" not in Endpoint.seen[-1]
    with pytest.raises(AuthenticationError, match="wrong key"):
        openai_judge("llama", endpoint, "wrong")(messages)


def test_a_local_judge_needs_a_chat_template(smollm2: HookedSAETransformer):
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    tokenizer.chat_template = None
    model: Any = None
    with pytest.raises(ValueError, match="tokenizer must have a chat template"):
        local_judge(model, tokenizer)

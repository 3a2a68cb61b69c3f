"""Explanation of a text token by token."""

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from sae_lens import HookedSAETransformer

from sae_lens_scale.analysis.tokens import explain_tokens


def test_explain_tokens_lists_what_encode_and_route_compute(
    smollm2: HookedSAETransformer, make_sae: Any
):
    hook = "blocks.8.hook_resid_post"
    sae = make_sae(hook=hook, d_in=576, d_sae=1_152, num_experts=8, k=5)
    text = "I love apples"
    explanations = explain_tokens(smollm2, sae, text, max_latents=3)
    assert [e.token for e in explanations] == ["I", " love", " apples"]
    assert [e.position for e in explanations] == [1, 2, 3]
    with torch.no_grad():
        _, cache = smollm2.run_with_cache(text, names_filter=hook)
        acts, routing = sae.encode(cache[hook])[0], sae.route(cache[hook])
    for e in explanations:
        assert e.experts == routing.indices[0, e.position].tolist()
        assert e.expert_weights == routing.weights[0, e.position].tolist()
        strongest = acts[e.position].topk(3)
        assert [a.latent for a in e.latents] == strongest.indices.tolist()
        assert [a.activation for a in e.latents] == strongest.values.tolist()
        assert [a.expert for a in e.latents] == (strongest.indices // 144).tolist()
    assert not smollm2.acts_to_saes


@pytest.mark.parametrize(("architecture", "experts"), [("switch", 4), ("topk", 1)])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_a_dense_SAE_is_a_single_expert(
    tiny_model: HookedSAETransformer,
    make_sae: Any,
    architecture: str,
    experts: int,
    prepend_bos: bool,
):
    sae = make_sae(architecture)
    sae.cfg.metadata.prepend_bos = prepend_bos
    explanations = explain_tokens(tiny_model, sae, "I love apples", max_latents=100)
    assert [e.position for e in explanations] == [i + prepend_bos for i in range(3)]
    tokens = tiny_model.to_tokens("I love apples", prepend_bos=prepend_bos)
    hook = sae.cfg.metadata.hook_name
    with torch.no_grad():
        _, cache = tiny_model.run_with_cache(tokens, names_filter=hook)
        acts = sae.encode(cache[hook])[0]
    for e in explanations:
        fired = {a.latent: a.activation for a in e.latents}
        assert fired == {i: a for i, a in enumerate(acts[e.position].tolist()) if a > 0}
        (expert,) = e.experts
        assert {a.expert for a in e.latents} == {expert}
        assert {i * experts // 64 for i in fired} == {expert}
        assert experts > 1 or e.expert_weights == [1.0]
    assert json.loads(json.dumps([asdict(e) for e in explanations]))


@pytest.mark.parametrize(
    ("hook", "max_latents", "message"),
    [
        ("blocks.99.hook_resid_post", 8, "hook_name must be .*'blocks.99"),
        ("blocks.0.hook_resid_post", -1, "max_latents must be .* got -1"),
    ],
)
def test_another_models_SAE_and_a_negative_number_of_latents_are_refused(
    tiny_model: HookedSAETransformer,
    make_sae: Any,
    hook: str,
    max_latents: int,
    message: str,
):
    with pytest.raises(ValueError, match=message):
        explain_tokens(tiny_model, make_sae(hook=hook), "I love apples", max_latents)

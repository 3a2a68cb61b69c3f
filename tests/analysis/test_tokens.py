"""Explanation of a text token by token."""

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from helpers import randomize
from sae_lens import SAE, HookedSAETransformer
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from sae_lens_scale import ScaleSAE, ScaleSAEConfig, SwitchSAE, SwitchSAEConfig
from sae_lens_scale.analysis.tokens import explain_tokens

HOOK = "blocks.8.hook_resid_post"
TINY_HOOK = "blocks.0.hook_resid_post"


def smollm2_sae() -> ScaleSAE:
    return prepared(
        ScaleSAE(ScaleSAEConfig(d_in=576, d_sae=1_152, num_experts=8, k=5)), HOOK
    )


def prepared(sae: Any, hook: str, prepend_bos: bool = True) -> Any:
    randomize(sae)
    sae.cfg.metadata.hook_name = hook
    sae.cfg.metadata.prepend_bos = prepend_bos
    return sae


def test_explain_tokens_lists_what_encode_and_route_compute(
    smollm2: HookedSAETransformer,
):
    sae = smollm2_sae()
    text = "I love apples"
    explanations = explain_tokens(smollm2, sae, text, max_latents=3)
    assert [e.token for e in explanations] == ["I", " love", " apples"]
    assert [e.position for e in explanations] == [1, 2, 3]
    with torch.no_grad():
        _, cache = smollm2.run_with_cache(text, names_filter=HOOK)
        acts, routing = sae.encode(cache[HOOK])[0], sae.route(cache[HOOK])
    for e in explanations:
        assert e.experts == routing.indices[0, e.position].tolist()
        assert e.expert_weights == routing.weights[0, e.position].tolist()
        assert 0 < len(e.latents) <= 3
        activations = [a.activation for a in e.latents]
        assert activations == sorted(activations, reverse=True)
        for a in e.latents:
            assert a.activation == acts[e.position, a.latent].item()
            assert a.expert == a.latent // 144
            assert a.expert in e.experts
    assert not smollm2.acts_to_saes


@pytest.mark.parametrize(
    ("sae", "experts"),
    [
        (
            SwitchSAE(
                SwitchSAEConfig(d_in=32, d_sae=64, num_experts=4, k=5, gate="uniform")
            ),
            4,
        ),
        (TopKSAE(TopKSAEConfig(d_in=32, d_sae=64, k=5)), 1),
    ],
    ids=["switch", "dense"],
)
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_a_dense_SAE_is_a_single_expert(
    tiny_model: HookedSAETransformer, sae: SAE[Any], experts: int, prepend_bos: bool
):
    prepared(sae, TINY_HOOK, prepend_bos)
    explanations = explain_tokens(tiny_model, sae, "I love apples", max_latents=100)
    assert [e.position for e in explanations] == [
        i + prepend_bos for i in range(len(explanations))
    ]
    tokens = tiny_model.to_tokens("I love apples", prepend_bos=prepend_bos)
    with torch.no_grad():
        _, cache = tiny_model.run_with_cache(tokens, names_filter=TINY_HOOK)
        acts = sae.encode(cache[TINY_HOOK])[0]
    for e in explanations:
        fired = {a.latent: a.activation for a in e.latents}
        assert fired == {i: a for i, a in enumerate(acts[e.position].tolist()) if a > 0}
        assert e.expert_weights == [1.0]
        (expert,) = e.experts
        assert {a.expert for a in e.latents} == {expert}
        assert {i * experts // 64 for i in fired} == {expert}
    # The tiny model uses few of the latents, but every token some.
    assert all(e.latents for e in explanations)
    assert json.loads(json.dumps([asdict(e) for e in explanations]))


def test_explain_tokens_refuses_an_SAE_of_another_model(
    smollm2: HookedSAETransformer,
):
    sae = smollm2_sae()
    sae.cfg.metadata.hook_name = "blocks.99.hook_resid_post"
    with pytest.raises(ValueError, match="hook_name must be .*'blocks.99"):
        explain_tokens(smollm2, sae, "I love apples")


def test_explain_tokens_refuses_a_negative_number_of_latents(
    tiny_model: HookedSAETransformer,
):
    with pytest.raises(ValueError, match="max_latents must be .* got -1"):
        explain_tokens(tiny_model, smollm2_sae(), "I love apples", max_latents=-1)

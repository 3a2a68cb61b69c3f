"""Explanation of a text token by token."""

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from sae_lens import HookedSAETransformer

from sae_lens_scale.analysis.tokens import ActiveLatent, explain_tokens


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


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["scale", "abstopk"])
def test_models_of_all_kinds_are_read(kind: Any, make_sae: Any, architecture: str):
    sae = make_sae(architecture, kind.hook)
    ids = [1, *kind.model.tokenizer("I love $$", add_special_tokens=False)["input_ids"]]
    _, cache = kind.model.run_with_cache(
        torch.tensor([ids]), names_filter=[kind.own_hook]
    )
    acts = sae.encode(cache[kind.own_hook])[0]
    explanations = explain_tokens(kind.model, sae, "I love $$", max_latents=64)
    assert [e.token for e in explanations] == ["I", " love", " $$"]
    assert [e.position for e in explanations] == [1, 2, 3]
    for e in explanations:
        found = {a.latent: a.activation for a in e.latents}
        want = {i: a for i, a in enumerate(acts[e.position].tolist()) if a != 0}
        assert found == pytest.approx(want, rel=1e-5)
        magnitudes = [abs(a.activation) for a in e.latents]
        assert magnitudes == sorted(magnitudes, reverse=True)
    negative = any(a.activation < 0 for e in explanations for a in e.latents)
    assert negative == (architecture == "abstopk")


def test_one_head_is_explained(tiny_model: HookedSAETransformer, make_sae: Any):
    hook = "blocks.0.attn.hook_z"
    sae = make_sae(hook=hook, d_in=8)
    sae.cfg.metadata.hook_head_index = 2
    explanations = explain_tokens(tiny_model, sae, "I love apples", max_latents=64)
    with torch.no_grad():
        _, cache = tiny_model.run_with_cache("I love apples", names_filter=hook)
        acts = sae.encode(cache[hook][0, :, 2])
    for e in explanations:
        found = {a.latent: a.activation for a in e.latents}
        want = {i: a for i, a in enumerate(acts[e.position].tolist()) if a}
        assert found == pytest.approx(want, rel=1e-5)


def test_a_transcoder_is_explained_by_its_input(
    tiny_model: HookedSAETransformer, make_sae: Any
):
    settings = {"d_out": 32, "apply_b_dec_to_input": False}
    sae = make_sae("transcoder", "blocks.0.hook_resid_pre", **settings)
    want = explain_tokens(tiny_model, sae, "I love apples")
    sae.cfg.metadata.hook_name_out = "blocks.0.hook_mlp_out"
    assert explain_tokens(tiny_model, sae, "I love apples") == want


def test_a_latent_that_a_hook_turns_up_is_listed_with_its_own_expert(
    tiny_model: HookedSAETransformer, make_sae: Any
):
    sae = make_sae()
    (before,) = explain_tokens(tiny_model, sae, "I")
    (expert, _) = {0, 1, 2, 3} - set(before.experts)

    def turn_up(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        acts[..., 16 * expert] = 1_000
        return acts

    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", turn_up)]):
        (explained,) = explain_tokens(tiny_model, sae, "I")
    assert explained.latents[0] == ActiveLatent(16 * expert, expert, 1_000.0)
    assert explained.experts == before.experts
    assert explained.latents[1:] == before.latents[:7]


def test_the_longest_text_that_a_model_reads_is_explained_and_no_longer_one(
    kind: Any, make_sae: Any
):
    sae = make_sae(hook=kind.hook)
    longest = " word" * (kind.n_ctx - 1)
    explanations = explain_tokens(kind.model, sae, longest, max_latents=1)
    assert [e.token for e in explanations] == [" word"] * (kind.n_ctx - 1)
    with pytest.raises(ValueError, match="text .* must be at most the 128 .* got 129"):
        explain_tokens(kind.model, sae, longest + " word")


def test_activations_that_are_not_finite_are_refused(
    tiny_model: HookedSAETransformer, make_sae: Any, overflowing: Any
):
    sae = make_sae()
    hook = sae.cfg.metadata.hook_name
    want = explain_tokens(tiny_model, sae, "I love apples")
    # The BOS is not explained.
    with tiny_model.hooks(fwd_hooks=[(hook, overflowing(0))]):
        got = explain_tokens(tiny_model, sae, "I love apples")
    for a, b in zip(got, want, strict=True):
        assert [x.latent for x in a.latents] == [x.latent for x in b.latents]
    for max_latents in (0, 8):
        with (
            tiny_model.hooks(fwd_hooks=[(hook, overflowing(2))]),
            pytest.raises(ValueError, match="activations must be finite.* token 2"),
        ):
            explain_tokens(tiny_model, sae, "I love apples", max_latents)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hook": "blocks.99.hook_resid_post"}, "hook_name must be .*'blocks.99"),
        ({"max_latents": -1}, "max_latents must be at least 0, got -1"),
        ({"max_latents": 1.5}, r"max_latents must be an integer, got 1\.5"),
        ({"text": ["I love", "apples"]}, "text must be a string, got list"),
        ({"text": "a\udcff"}, r"text must be Unicode text, got 'a\\udcff'"),
        ({"text": ""}, "text must have at least one token, got ''"),
    ],
)
def test_bad_arguments_are_refused(
    tiny_model: HookedSAETransformer,
    make_sae: Any,
    change: dict[str, Any],
    message: str,
):
    arguments: dict[str, Any] = {"hook": "blocks.0.hook_resid_post"}
    arguments |= {"text": "I love apples"} | change
    sae = make_sae(hook=arguments.pop("hook"))
    with pytest.raises(ValueError, match=message):
        explain_tokens(tiny_model, sae, **arguments)


def test_the_default_device_does_not_matter(
    tiny_model: HookedSAETransformer, make_sae: Any
):
    sae = make_sae()
    with torch.device("meta"):
        got = explain_tokens(tiny_model, sae, "I love apples")
    assert got == explain_tokens(tiny_model, sae, "I love apples")

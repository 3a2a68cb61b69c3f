"""SAEs under nnsight: every hook point shows and edits what a hook does."""

from importlib import import_module
from typing import Any

import pytest
import torch
from helpers import assert_close, draw, inference, scale_sae, switch_sae
from transformers import LlamaConfig, LlamaForCausalLM

# Only the environment of these tests has it.
NNsight: Any = import_module("nnsight").NNsight

X = draw(3, 7, 10, seed=1)
TOKENS = torch.arange(20).view(2, 10)


@pytest.fixture(params=[scale_sae, switch_sae], ids=["scale", "switch"])
def sae(request: pytest.FixtureRequest) -> Any:
    return inference(request.param(d_in=16, dtype="float32"))


@pytest.fixture
def model() -> LlamaForCausalLM:
    """A random Llama of two layers and width 16."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16}
    config = LlamaConfig(
        **sizes,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("make", [scale_sae, switch_sae])
def test_every_hook_point_shows_and_edits_what_a_hook_does(make: Any):
    plain, traced = inference(make()), inference(make())
    want, cache = plain.run_with_cache(X)
    watched = NNsight(traced)
    for name, value in cache.items():
        with watched.trace(X):
            got = getattr(watched, name).output.save()
            out = watched.output.save()
        assert_close(got, value)
        assert_close(out, want)
        # Of indices, another expert; of anything else, another value.
        edited = plain.run_with_hooks(X, fwd_hooks=[(name, lambda v, hook: v * 0)])
        with watched.trace(X):
            hook = getattr(watched, name)
            hook.output = hook.output * 0
            out = watched.output.save()
        assert_close(out, edited)


@torch.no_grad()
def test_in_a_language_model_of_hugging_face(model: LlamaForCausalLM, sae: Any):
    layer = model.model.layers[0]

    def splice(module: Any, inputs: Any, output: Any) -> Any:
        # transformers 4 returns a tuple.
        if isinstance(output, tuple):
            return (sae(output[0]), *output[1:])
        return sae(output)

    handle = layer.register_forward_hook(splice)
    want = model(TOKENS).logits
    handle.remove()
    assert (model(TOKENS).logits - want).abs().max() > 0.01

    model.add_module("sae", sae)
    watched = NNsight(model)
    with watched.edit() as (_, spliced):
        output = spliced.model.layers[0].output
        is_tuple = isinstance(output, tuple)
        recons = spliced.sae(output[0] if is_tuple else output, hook=True)
        spliced.model.layers[0].output = (recons, *output[1:]) if is_tuple else recons
    with spliced.trace(TOKENS):
        acts = spliced.sae.hook_sae_acts_post.output.save()
        logits = spliced.output.logits.save()
    assert acts.shape == (2, 10, 60)
    assert acts.count_nonzero(-1).max() == 6
    torch.testing.assert_close(logits, want)

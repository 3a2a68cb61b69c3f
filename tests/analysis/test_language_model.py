"""Access to the three kinds of language models that SAELens knows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from sae_lens import HookedSAETransformer
from sae_lens.load_model import load_model

from sae_lens_scale.analysis.contexts import latent_activations
from sae_lens_scale.analysis.language_model import (
    as_input,
    hook_of,
    token_strings,
    tokenizer_of,
)
from sae_lens_scale.upstream import input_device


def test_a_hook_is_found_under_either_name(kind: Any, make_sae: Any):
    for hook in (kind.hook, kind.own_hook):
        assert hook_of(kind.model, make_sae(hook=hook)) == kind.own_hook
    sae = make_sae(hook=kind.hook)
    with pytest.raises(ValueError, match="metadata.hook_name_out must be .* got None"):
        hook_of(kind.model, sae, "hook_name_out")
    sae.cfg.metadata.hook_name = "blocks.9.hook_resid_post"
    with pytest.raises(
        ValueError, match="hook_name must be .* got 'blocks.9.hook_resi"
    ):
        hook_of(kind.model, sae)


def test_a_hook_that_an_SAE_is_attached_to_is_refused(
    tiny_model: HookedSAETransformer, make_sae: Any
):
    sae = make_sae()
    with (
        tiny_model.saes([sae]),
        pytest.raises(ValueError, match=r"model.reset_saes\(\) detaches .*\['blocks.0"),
    ):
        hook_of(tiny_model, sae)
    assert hook_of(tiny_model, sae) == sae.cfg.metadata.hook_name


def test_tokens_are_decoded_one_by_one(kind: Any):
    ids = kind.model.tokenizer(" apples, I love\n", add_special_tokens=False).input_ids
    want = [kind.model.tokenizer.decode([i]) for i in ids]
    assert token_strings(kind.model, ids) == want
    assert token_strings(kind.model, torch.tensor(ids)) == want
    assert token_strings(kind.model, ids[:1]) == want[:1]


def test_passages_longer_than_the_context_are_refused(kind: Any):
    longest = torch.zeros(2, kind.n_ctx, dtype=torch.long)
    assert torch.equal(as_input(kind.model, longest), longest)
    with pytest.raises(ValueError, match="must be at most the 128 tokens .* got 129"):
        as_input(kind.model, torch.zeros(2, kind.n_ctx + 1, dtype=torch.long))


def test_tokens_of_another_vocabulary_are_refused(kind: Any):
    last = len(kind.model.tokenizer) - 1
    as_input(kind.model, torch.tensor([[5, last]]))
    with pytest.raises(
        ValueError, match=f"less than {last + 1}, .* got .* to {last + 1}"
    ):
        as_input(kind.model, torch.tensor([[5, last + 1]]))


def test_a_model_without_a_tokenizer_is_refused_by_the_purpose(
    tiny_model: HookedSAETransformer, monkeypatch: pytest.MonkeyPatch
):
    assert tokenizer_of(tiny_model, "text") is tiny_model.tokenizer
    monkeypatch.setattr(tiny_model, "tokenizer", None)
    with pytest.raises(ValueError, match="text needs a model with a tokenizer, got no"):
        tokenizer_of(tiny_model, "text")


def test_tokens_go_to_the_embeddings_and_not_to_the_first_parameter(
    tiny_llama: Path, make_tokens: Any
):
    model: Any = load_model("AutoModelForCausalLM", str(tiny_llama))
    model.first = torch.nn.Parameter(torch.zeros(1, device="meta"))
    assert next(model.parameters()).device.type == "meta"
    assert input_device(model).type == "cpu"
    assert as_input(model, make_tokens()).device.type == "cpu"


def test_a_model_whose_weights_are_elsewhere_until_they_are_used(
    tiny_llama: Path, make_sae: Any, make_tokens: Any
):
    sae = make_sae(hook="model.layers.0")
    model: Any = load_model("AutoModelForCausalLM", str(tiny_llama))
    ((_, want),) = latent_activations(model, sae, [make_tokens()], range(64))
    cpu_offload(model.model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    ((_, got),) = latent_activations(model, sae, [make_tokens()], range(64))
    torch.testing.assert_close(got, want)


def test_a_model_of_another_kind_is_refused(tiny_llama: Path, make_sae: Any):
    model: Any = load_model("AutoModelForCausalLM", str(tiny_llama)).model
    with pytest.raises(ValueError, match="model must be .* got LlamaForCausalLM"):
        hook_of(model, make_sae(hook="model.layers.0"))

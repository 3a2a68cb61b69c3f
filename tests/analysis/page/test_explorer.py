"""Data of the explorer page against the SAE's own activations."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from analysis.page.reading import dense_activations, read

from sae_lens_scale.analysis import explorer
from sae_lens_scale.analysis.autointerp.results import (
    Interpretability,
    LatentInterpretation,
    QuantileScores,
)
from sae_lens_scale.analysis.autointerp.settings import AutointerpSettings
from sae_lens_scale.analysis.page import active_latents


def activations_at(kind: Any, sae: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Activations at the hook of an SAE, ``[tokens, d_in]``."""
    _, cache = kind.model.run_with_cache(tokens, names_filter=[kind.own_hook])
    return cache[kind.own_hook].flatten(0, 1)


@pytest.mark.parametrize("architecture", ["scale", "switch", "topk", "abstopk"])
def test_the_page_has_what_the_sae_computes(
    kind: Any, architecture: str, make_sae: Any, make_tokens: Any
):
    sae, tokens = make_sae(architecture, kind.hook), make_tokens()
    html = explorer(kind.model, sae, tokens.split(3), verbose=False)
    facts, arrays = read(html)
    x = activations_at(kind, sae, tokens)
    expected = sae.encode(x).detach()
    ignored = torch.isin(tokens.flatten(), torch.tensor([0, 1, 2]))
    expected[ignored] = 0
    got = torch.from_numpy(dense_activations(facts, arrays)).float()
    assert expected.any()
    assert ((got != 0) == (expected != 0)).all()
    # In steps of what the page tells apart, of each latent. What fires least has one, not none.
    step = (expected.abs().amax(dim=0) / facts["steps"]).clamp(min=1e-9)
    off = (got - expected).abs() / step
    assert (off <= torch.where(expected.abs() < step, 1.01, 0.51)).all()
    assert facts["steps"] == (125 if architecture == "abstopk" else 250)
    strings = [facts["strings"][i] for i in arrays["tokens"]]
    assert strings == kind.model.tokenizer.batch_decode(
        [[i] for i in tokens.flatten().tolist()], clean_up_tokenization_spaces=False
    )
    assert {facts["strings"][i] for i in facts["excluded"]} == {
        kind.model.tokenizer.decode([i]) for i in (1, 2)
    }
    assert arrays["lengths"].tolist() == [16] * 7
    if architecture in ("scale", "switch"):
        routing = sae.route(x)
        experts = arrays["experts"].reshape(len(strings), -1)
        gates = arrays["gates"].reshape(experts.shape) * facts["gate_step"]
        assert experts.tolist() == routing.indices.tolist()
        assert np.allclose(gates, routing.weights.detach(), rtol=0, atol=1e-4)
    else:
        assert not arrays["experts"].size
        assert facts["num_experts"] == 1


def test_neighbours_and_promoted_tokens_are_those_of_brute_force(
    kind: Any, make_sae: Any, make_tokens: Any
):
    sae = make_sae(hook=kind.hook)
    facts, arrays = read(explorer(kind.model, sae, [make_tokens()], verbose=False))
    alive = torch.from_numpy(arrays["alive"].astype(int))
    W_dec = sae.W_dec[alive].detach()
    cosines = torch.nn.functional.cosine_similarity(W_dec[:, None], W_dec, dim=-1)
    cosines.fill_diagonal_(-2)
    best = cosines.topk(min(8, len(alive) - 1))
    assert (
        arrays["nearest"].reshape(best.indices.shape).tolist() == best.indices.tolist()
    )
    listed = arrays["cosines"].reshape(best.values.shape) / facts["cosine_steps"]
    assert np.allclose(listed, best.values, atol=6e-5)
    same = (alive[:, None] // 16) == (alive // 16)
    for name, mask in (("within", same), ("between", ~same)):
        largest = torch.where(mask, cosines, -1.0).amax(dim=1).clamp(min=-1)
        assert np.allclose(arrays[name] / facts["cosine_steps"], largest, atol=6e-5)

    # Through an RMSNorm, whose weights are ones in these models, directions keep theirs.
    if hasattr(kind.model, "W_U"):
        W_U = kind.model.W_U.detach()
    else:
        W_U = kind.model.model.lm_head.weight.detach().T
    logits = W_dec @ W_U
    strings = np.array(facts["strings"])
    text = kind.model.tokenizer.batch_decode
    for name, largest in (("promoted", True), ("suppressed", False)):
        ids = logits.topk(8, largest=largest).indices
        expected = [
            text([[i] for i in row], clean_up_tokenization_spaces=False)
            for row in ids.tolist()
        ]
        assert strings[arrays[name]].reshape(-1, 8).tolist() == expected


def test_directions_inside_a_layer_promote_nothing(
    tiny_model: Any, make_sae: Any, make_tokens: Any
):
    # As wide as the residual stream, but not of it.
    sae = make_sae(hook="blocks.0.attn.hook_z")
    _, arrays = read(explorer(tiny_model, sae, [make_tokens()], verbose=False))
    assert len(arrays["alive"])
    assert not arrays["promoted"].size
    assert not arrays["suppressed"].size


def test_prompts_come_first_whole_and_beside_the_corpus(
    tiny_model: Any, make_sae: Any, make_tokens: Any
):
    sae, tokens = make_sae(), make_tokens()
    prompts = ["I love apples", "$$ <b>"]
    facts, arrays = read(
        explorer(tiny_model, sae, [tokens], prompts=prompts, verbose=False)
    )
    assert facts["num_prompts"] == 2
    lengths = arrays["lengths"].tolist()
    assert lengths[2:] == [16] * 7
    strings = [facts["strings"][i] for i in arrays["tokens"]]
    bos = tiny_model.tokenizer.bos_token
    assert "".join(strings[: lengths[0]]) == f"{bos}I love apples"
    assert "".join(strings[lengths[0] : sum(lengths[:2])]) == f"{bos}$$ <b>"


def test_explanations_and_their_scores_are_on_the_page(
    tiny_model: Any, make_sae: Any, make_tokens: Any
):
    scores = QuantileScores(["not", 1], [0.5, 1.0], [1, 2], [2, 2], [2, 2])
    nothing = replace(scores, correct=[0, 0], answered=[0, 0])
    found = Interpretability(
        scores,
        nothing,
        [LatentInterpretation(5, "words </script>", scores, nothing)],
        [],
        7,
        AutointerpSettings(),
    )
    html = explorer(
        tiny_model, make_sae(), [make_tokens()], interpretability=found, verbose=False
    )
    facts, _ = read(html)
    assert facts["explanations"] == {
        "5": {"text": "words </script>", "detection": 0.75, "fuzzing": None}
    }


def test_the_same_data_make_the_same_page_whatever_the_default_device(
    tiny_model: Any, make_sae: Any, make_tokens: Any
):
    sae, tokens = make_sae(), [make_tokens()]
    page = explorer(tiny_model, sae, tokens, prompts=["apples"], verbose=False)
    with torch.device("meta"):
        again = explorer(tiny_model, sae, tokens, prompts=["apples"], verbose=False)
    assert page == again


def test_a_token_that_is_not_finite_is_named(
    tiny_model: Any, make_sae: Any, make_tokens: Any, overflowing: Any
):
    hooks = [("blocks.0.hook_resid_post", overflowing(3))]
    with (
        tiny_model.hooks(fwd_hooks=hooks),
        pytest.raises(ValueError, match=r"batch 0, at token \(0, 3\)"),
    ):
        explorer(tiny_model, make_sae(), [make_tokens()], verbose=False)
    # The BOS does not count.
    hooks = [("blocks.0.hook_resid_post", overflowing(0))]
    with tiny_model.hooks(fwd_hooks=hooks):
        _, arrays = read(
            explorer(tiny_model, make_sae("topk"), [make_tokens()], verbose=False)
        )
    assert np.isfinite(arrays["largest"]).all()
    assert arrays["counts"][0] == 0


def test_a_page_that_would_be_too_long_is_refused(
    tiny_model: Any, make_sae: Any, make_tokens: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(active_latents, "_MAX_BYTES", 3_000_000)
    batches = iter([make_tokens(rows=500)] * 100)
    with pytest.raises(ValueError, match="tokens must be fewer: .* more than 3 MB"):
        explorer(tiny_model, make_sae(), batches, verbose=False)
    # Not only at the end.
    assert len(list(batches)) > 50


def test_nothing_to_show_is_refused(tiny_model: Any, make_sae: Any, make_tokens: Any):
    sae = make_sae()
    silent = [torch.ones(2, 3, dtype=torch.int64)]
    for tokens, prompts, message in (
        ([], ["text"], "tokens must hold at least one batch, got none"),
        ([make_tokens()], [""], "text must have at least one token, got ''"),
        # Prompts do not count.
        (silent, ["text"], "tokens must fire at least one latent"),
    ):
        with pytest.raises(ValueError, match=message):
            explorer(tiny_model, sae, tokens, prompts=prompts, verbose=False)
    # A hook may turn all latents off, and weights may.
    zeros = ("hook_sae_acts_post", lambda acts, hook: torch.zeros_like(acts))
    with (
        sae.hooks(fwd_hooks=[zeros]),
        pytest.raises(ValueError, match="tokens must fire at least one latent"),
    ):
        explorer(tiny_model, sae, [make_tokens()], verbose=False)
    sae.b_enc.data.fill_(-1e6)
    with pytest.raises(ValueError, match="tokens must fire at least one latent"):
        explorer(tiny_model, sae, [make_tokens()], verbose=False)


def test_what_the_page_cannot_show_is_refused_before_the_text_is_read(
    tiny_model: Any, make_sae: Any, make_tokens: Any
):
    sae, batches = make_sae(), iter([make_tokens()])
    sae.cfg.metadata.omega = [0.5, float("nan"), 0.0, 1.0]
    with pytest.raises(ValueError, match="omega must be 4 finite numbers"):
        explorer(tiny_model, sae, batches, verbose=False)
    assert len(list(batches)) == 1

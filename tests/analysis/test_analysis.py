"""Expert usage, token explanations and their picture."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomize
from sae_lens import HookedSAETransformer

from sae_lens_scale import ScaleSAE, ScaleSAEConfig
from sae_lens_scale.analysis.experts import expert_usage
from sae_lens_scale.analysis.plots import plot_token_explanations
from sae_lens_scale.analysis.tokens import explain_tokens

HOOK = "blocks.8.hook_resid_post"


def smollm2_sae(**overrides: Any) -> ScaleSAE:
    sae = ScaleSAE(
        ScaleSAEConfig(d_in=576, d_sae=1_152, num_experts=8, k=5, **overrides)
    )
    randomize(sae)
    sae.cfg.metadata.hook_name = HOOK
    sae.cfg.metadata.prepend_bos = True
    return sae


def test_expert_usage_counts_the_selections_of_all_batches():
    sae = ScaleSAE(ScaleSAEConfig(d_in=4, d_sae=16, num_experts=4, k=2))
    sae.W_router.data = torch.eye(4)
    sae.b_router.data.zero_()
    # Experts 0 and 1 for the first three tokens, 0 and 2 for the fourth.
    batches = [
        torch.tensor([[3.0, 2, 1, 0]]).repeat(3, 1),
        torch.tensor([3.0, 1, 2, 0]),
    ]
    usage = expert_usage(sae, batches)
    assert usage.counts == [4, 3, 1, 0]
    assert usage.idle_experts == 1
    share = torch.tensor([4 / 8, 3 / 8, 1 / 8])
    want = -(share * share.log()).sum() / torch.tensor(4.0).log()
    assert usage.entropy == pytest.approx(want.item())


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


def test_explain_tokens_refuses_an_SAE_of_another_model(
    smollm2: HookedSAETransformer,
):
    sae = smollm2_sae()
    sae.cfg.metadata.hook_name = "blocks.99.hook_resid_post"
    with pytest.raises(ValueError, match="hook_name must be .*'blocks.99"):
        explain_tokens(smollm2, sae, "I love apples")


def test_plot_token_explanations_draws_every_latent(
    smollm2: HookedSAETransformer, tmp_path: Path
):
    explanations = explain_tokens(smollm2, smollm2_sae(), "I love apples")
    figure = plot_token_explanations(explanations, "title")
    (axes,) = figure.axes
    lengths = sorted(bar.get_width() for bar in axes.patches)  # type: ignore[attr-defined]
    want = sorted(a.activation for e in explanations for a in e.latents)
    assert lengths == pytest.approx(want)
    figure.savefig(tmp_path / "tokens.png")
    assert (tmp_path / "tokens.png").stat().st_size > 10_000


def test_plot_token_explanations_refuses_nothing_to_draw():
    with pytest.raises(ValueError, match="explanations must not be empty"):
        plot_token_explanations([], "title")

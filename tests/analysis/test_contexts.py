"""The passages that fire a latent most, against a loop over tokens."""

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from helpers import randomize, small_corpus
from sae_lens import SAE, HookedSAETransformer
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from sae_lens.training.activations_store import ActivationsStore
from transformers import PreTrainedTokenizerBase

from sae_lens_scale import ScaleSAE, ScaleSAEConfig, SwitchSAE, SwitchSAEConfig
from sae_lens_scale.analysis import contexts
from sae_lens_scale.analysis.contexts import (
    Context,
    LatentContexts,
    top_activating_contexts,
)

HOOK = "blocks.0.hook_resid_post"
# SmolLM2's tokenizer: BOS and EOS.
BOS, EOS = 1, 2

SAES = {
    "scale": lambda: ScaleSAE(ScaleSAEConfig(d_in=32, d_sae=64, num_experts=4, k=6)),
    "switch": lambda: SwitchSAE(SwitchSAEConfig(d_in=32, d_sae=64, num_experts=4, k=6)),
    "topk": lambda: TopKSAE(TopKSAEConfig(d_in=32, d_sae=64, k=6)),
    "standard": lambda: StandardSAE(StandardSAEConfig(d_in=32, d_sae=64)),
}


def make_sae(architecture: str, hook: str = HOOK) -> SAE[Any]:
    sae: Any = SAES[architecture]()
    randomize(sae)
    sae.cfg.metadata.hook_name = hook
    sae.cfg.metadata.context_size = 16
    sae.cfg.metadata.prepend_bos = True
    return sae


def make_tokens(seed: int = 0, rows: int = 7, length: int = 16) -> torch.Tensor:
    """Random tokens behind a BOS, an EOS amid them, one row there twice."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 1_000, (rows, length), generator=generator)
    tokens[:, 0] = BOS
    tokens[0, length // 2] = EOS
    tokens[-1] = tokens[0]
    return tokens


def top(
    model: HookedSAETransformer, sae: SAE[Any], tokens: Any, latents: Any, **kwargs: Any
) -> list[LatentContexts]:
    return top_activating_contexts(model, sae, tokens, latents, verbose=False, **kwargs)


@torch.no_grad()
def activations(
    model: HookedSAETransformer, sae: SAE[Any], tokens: torch.Tensor
) -> torch.Tensor:
    _, cache = model.run_with_cache(tokens, names_filter=HOOK)
    return sae.encode(cache[HOOK])


def by_hand(
    model: HookedSAETransformer,
    sae: SAE[Any],
    tokens: torch.Tensor,
    latent: int,
    n: int,
    window: int,
    excluded: tuple[int, ...] = (BOS, EOS),
) -> LatentContexts:
    found = []
    fires = activations(model, sae, tokens)[..., latent].tolist()
    for passage, row in enumerate(tokens.tolist()):
        acts = [
            0.0 if token in excluded else a
            for token, a in zip(row, fires[passage], strict=True)
        ]
        peak = max(acts)
        if peak > 0:
            at = acts.index(peak)
            first, end = max(0, at - window), at + window + 1
            words = [str(model.to_string([token])) for token in row[first:end]]
            found.append(Context(peak, passage, at, words, acts[first:end], at - first))
    found.sort(key=lambda context: -context.activation)
    return LatentContexts(latent, found[:n])


def assert_same(actual: list[LatentContexts], expected: list[LatentContexts]) -> None:
    """Numbers may differ by the rounding of another batch size; all else is equal."""
    for got, want in zip(actual, expected, strict=True):
        assert got.latent == want.latent
        for a, b in zip(got.contexts, want.contexts, strict=True):
            assert a.activation == pytest.approx(b.activation, rel=1e-5)
            assert a.activations == pytest.approx(b.activations, rel=1e-5, abs=1e-6)
            assert (a.passage, a.position, a.peak) == (b.passage, b.position, b.peak)
            assert a.tokens == b.tokens


@pytest.mark.parametrize("architecture", list(SAES))
@pytest.mark.parametrize(("n", "window"), [(1, 0), (3, 2), (50, 50)])
def test_contexts_are_those_of_a_loop_over_all_tokens(
    tiny_model: HookedSAETransformer, architecture: str, n: int, window: int
):
    sae, tokens = make_sae(architecture), make_tokens()
    latents = [63, *range(20)]
    got = top(tiny_model, sae, [tokens], latents, n=n, window=window)
    want = [by_hand(tiny_model, sae, tokens, i, n, window) for i in latents]
    assert_same(got, want)
    assert any(one.contexts for one in got)
    for one in got:
        for context in one.contexts:
            assert context.activations[context.peak] == context.activation
    assert json.loads(json.dumps([asdict(one) for one in got]))


@pytest.mark.parametrize("sizes", [[1] * 7, [2, 2, 3], [5, 2]])
def test_batches_do_not_matter_even_where_passages_tie(
    tiny_model: HookedSAETransformer, sizes: list[int]
):
    sae, tokens = make_sae("scale"), make_tokens()
    latents = list(range(64))
    want = top(tiny_model, sae, [tokens], latents, n=2)
    got = top(tiny_model, sae, iter(tokens.split(sizes)), latents, n=2)
    assert_same(got, want)
    # The last row is the first once more: the first comes first, and may leave no place.
    ties = [[c.passage for c in one.contexts] for one in got]
    assert any(passages == [0, 6] for passages in ties)
    assert not any(passages[0] == 6 for passages in ties if passages)


def test_rows_of_other_lengths_and_of_one_token(tiny_model: HookedSAETransformer):
    sae = make_sae("standard")
    parts = [
        make_tokens(1, length=9),
        make_tokens(2, length=20),
        make_tokens(3)[:, 5:6],
    ]
    got = top(tiny_model, sae, parts, range(20), n=30, window=3)
    for one in got:
        want = []
        for i, part in enumerate(parts):
            hits = by_hand(tiny_model, sae, part, one.latent, 30, 3).contexts
            want += [(c.activation, c.passage + 7 * i, c.tokens) for c in hits]
        want.sort(key=lambda hit: -hit[0])
        assert [(c.passage, c.tokens) for c in one.contexts] == [h[1:] for h in want]
    assert {len(c.tokens) for one in got for c in one.contexts} >= {1, 7}


def test_which_tokens_are_excluded_can_be_chosen(tiny_model: HookedSAETransformer):
    sae, tokens = make_sae("standard"), make_tokens()
    for excluded, ids in ((False, ()), ([BOS, 40, 41], (BOS, 40, 41))):
        got = top(tiny_model, sae, [tokens], [2], n=9, exclude_special_tokens=excluded)
        assert_same(got, [by_hand(tiny_model, sae, tokens, 2, 9, 10, ids)])
    positions = {c.position for c in got[0].contexts}
    assert positions


def test_a_latent_that_never_fires_has_no_contexts(tiny_model: HookedSAETransformer):
    sae = make_sae("scale")
    sae.get_parameter("b_enc").data[5] = -1_000
    (dead, other) = top(tiny_model, sae, [make_tokens()], [5, 6])
    assert dead == LatentContexts(5, [])
    assert other.latent == 6


def test_only_a_part_of_a_batch_is_encoded_at_a_time(
    tiny_model: HookedSAETransformer, monkeypatch: pytest.MonkeyPatch
):
    sae, tokens = make_sae("scale"), make_tokens()
    want = top(tiny_model, sae, [tokens], [3, 4, 5])
    rows = []
    encode = sae.encode
    monkeypatch.setattr(sae, "encode", lambda x: rows.append(len(x)) or encode(x))
    monkeypatch.setattr(contexts, "_MAX_ACTIVATIONS", 64 * 10 + 63)
    assert_same(top(tiny_model, sae, [tokens], [3, 4, 5]), want)
    assert rows == [10] * 11 + [2]
    rows.clear()
    monkeypatch.setattr(contexts, "_MAX_ACTIVATIONS", 1)
    assert_same(top(tiny_model, sae, [tokens], [3, 4, 5]), want)
    assert rows == [1] * 112


def test_a_store_is_read_to_the_end_of_its_data_set(tiny_model: HookedSAETransformer):
    sae = make_sae("scale")
    corpus = small_corpus().select(range(4))

    def store() -> ActivationsStore:
        return ActivationsStore.from_sae(
            tiny_model, sae, corpus, store_batch_size_prompts=8
        )

    batches, another = [], store()
    with pytest.raises(StopIteration):
        while True:
            batches.append(another.get_batch_tokens(raise_at_epoch_end=True))
    assert len(batches) > 3
    latents = [1, 2, 3]
    want = top(tiny_model, sae, batches, latents)
    assert_same(top(tiny_model, sae, store(), latents), want)
    assert_same(
        top(tiny_model, sae, store(), latents, max_batches=2),
        top(tiny_model, sae, batches[:2], latents),
    )


@pytest.mark.parametrize("one_head", [False, True])
def test_attention_heads_are_joined_or_chosen_as_in_training(
    tiny_model: HookedSAETransformer, one_head: bool
):
    hook, head = "blocks.0.attn.hook_z", 2
    tokens = make_tokens()
    _, cache = tiny_model.run_with_cache(tokens, names_filter=hook)
    if one_head:
        sae: Any = ScaleSAE(ScaleSAEConfig(d_in=8, d_sae=32, num_experts=4, k=6))
        sae.cfg.metadata.hook_head_index = head
        x = cache[hook][:, :, head]
    else:
        cfg = ScaleSAEConfig(
            d_in=32, d_sae=32, num_experts=4, k=6, reshape_activations="hook_z"
        )
        sae = ScaleSAE(cfg)
        x = cache[hook].flatten(2)
    randomize(sae)
    sae.cfg.metadata.hook_name = hook
    if not one_head:
        sae.turn_on_forward_pass_hook_z_reshaping()
    got = top(tiny_model, sae, [tokens], range(32), n=1, exclude_special_tokens=False)
    assert sae.hook_z_reshaping_mode != one_head
    sae.turn_off_forward_pass_hook_z_reshaping()
    with torch.no_grad():
        want = sae.encode(x).amax((0, 1)).tolist()
    peaks = [one.contexts[0].activation if one.contexts else 0.0 for one in got]
    assert peaks == pytest.approx(want, rel=1e-5)


def test_contexts_of_a_real_model_hold_its_text(smollm2: HookedSAETransformer):
    hook = "blocks.2.hook_resid_post"
    sae: Any = ScaleSAE(ScaleSAEConfig(d_in=576, d_sae=1_152, num_experts=8, k=32))
    randomize(sae)
    sae.cfg.metadata.hook_name = hook
    texts = [
        "The cat sat on the mat all day",
        "We love green apples in autumn, don't we",
    ]
    tokens = [smollm2.to_tokens(text) for text in texts]
    found = top(smollm2, sae, tokens, range(1_152), n=2, window=2)
    hits = [c for one in found for c in one.contexts]
    assert {c.passage for c in hits} == {0, 1}
    for c in hits:
        assert "".join(c.tokens) in "<|im_start|>" + texts[c.passage]
        words = smollm2.to_str_tokens(texts[c.passage])
        assert c.tokens[c.peak] == words[c.position]
        assert c.position > 0
        assert c.tokens == words[max(0, c.position - 2) : c.position + 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": []}, r"latents must name .* got \[\]"),
        ({"latents": [3, 4, 3]}, r"latents must name .* got \[3, 4, 3\]"),
        ({"latents": [64]}, r"latents must be in range\(64\), got \[64\]"),
        ({"latents": [0, -1]}, r"latents must be in range\(64\), got \[0, -1\]"),
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"window": -1}, "window must be at least 0, got -1"),
        ({"max_batches": 0}, "max_batches must be at least 1, got 0"),
        ({"tokens": []}, "tokens must hold at least one batch, got none"),
        ({"tokens": make_tokens()}, r"tokens must be batches .* shape \(16,\)"),
        ({"tokens": [torch.rand(2, 4)]}, "tokens must be batches .* torch.float32"),
    ],
)
def test_bad_arguments_are_refused(
    tiny_model: HookedSAETransformer, change: dict[str, Any], message: str
):
    arguments = {"tokens": [make_tokens()], "latents": [1]} | change
    with pytest.raises(ValueError, match=message):
        top(tiny_model, make_sae("scale"), **arguments)


def test_a_model_that_lacks_the_hook_or_a_tokenizer_is_refused(
    tiny_model: HookedSAETransformer, monkeypatch: pytest.MonkeyPatch
):
    sae = make_sae("scale", "blocks.7.hook_resid_post")
    with pytest.raises(ValueError, match="hook_name must be .* 'blocks.7.hook_resid"):
        top(tiny_model, sae, [make_tokens()], [1])
    assert isinstance(tiny_model.tokenizer, PreTrainedTokenizerBase)
    monkeypatch.setattr(tiny_model, "tokenizer", None)
    with pytest.raises(
        ValueError, match="exclude_special_tokens=True needs .* got none"
    ):
        top(tiny_model, make_sae("scale"), [make_tokens()], [1])

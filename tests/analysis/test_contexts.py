"""The passages that fire a latent most, against a loop over tokens."""

import json
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_corpus
from sae_lens import SAE, HookedSAETransformer
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_scale.analysis import activations
from sae_lens_scale.analysis.contexts import (
    Context,
    LatentContexts,
    latent_activations,
    top_activating_contexts,
)

HOOK = "blocks.0.hook_resid_post"
# SmolLM2's tokenizer: BOS and EOS.
BOS, EOS = 1, 2

top = partial(top_activating_contexts, verbose=False)


@torch.no_grad()
def by_hand(
    model: Any,
    sae: SAE[Any],
    tokens: torch.Tensor,
    latent: int,
    n: int,
    window: int,
    excluded: tuple[int, ...] = (BOS, EOS),
    hook: str = HOOK,
) -> LatentContexts:
    found = []
    _, cache = model.run_with_cache(tokens, names_filter=[hook])
    fires = sae.encode(cache[hook])[..., latent].tolist()
    for passage, row in enumerate(tokens.tolist()):
        acts = [
            0.0 if token in excluded else a
            for token, a in zip(row, fires[passage], strict=True)
        ]
        peak = max(acts, key=abs)
        if peak != 0:
            at = acts.index(peak)
            first, end = max(0, at - window), at + window + 1
            words = [model.tokenizer.decode([token]) for token in row[first:end]]
            found.append(Context(peak, passage, at, words, acts[first:end], at - first))
    found.sort(key=lambda context: -abs(context.activation))
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


@pytest.mark.parametrize(
    "architecture", ["scale", "switch", "topk", "abstopk", "standard"]
)
@pytest.mark.parametrize(("n", "window"), [(1, 0), (3, 2), (50, 50), (2, 10**12)])
def test_contexts_are_those_of_a_loop_over_all_tokens(
    tiny_model: HookedSAETransformer,
    make_sae: Any,
    make_tokens: Any,
    architecture: str,
    n: int,
    window: int,
):
    sae, tokens = make_sae(architecture), make_tokens()
    latents = [63, *range(20)]
    got = top(tiny_model, sae, [tokens], latents, n=n, window=window)
    want = [by_hand(tiny_model, sae, tokens, i, n, window) for i in latents]
    assert_same(got, want)
    assert any(one.contexts for one in got)
    fires_negatively = any(c.activation < 0 for one in got for c in one.contexts)
    assert fires_negatively == (architecture == "abstopk")
    assert json.loads(json.dumps([asdict(one) for one in got]))


def test_models_of_all_kinds_are_read(kind: Any, make_sae: Any, make_tokens: Any):
    sae, tokens = make_sae(hook=kind.hook), make_tokens()
    got = top(kind.model, sae, tokens.split(3), range(20), n=3, window=2)
    want = [
        by_hand(kind.model, sae, tokens, i, 3, 2, hook=kind.own_hook) for i in range(20)
    ]
    assert_same(got, want)
    assert any(one.contexts for one in got)


@pytest.mark.parametrize("sizes", [[1] * 7, [2, 2, 3], [5, 2]])
def test_batches_do_not_matter_even_where_passages_tie(
    tiny_model: HookedSAETransformer, make_sae: Any, make_tokens: Any, sizes: list[int]
):
    sae, tokens = make_sae(), make_tokens()
    want = top(tiny_model, sae, [tokens], range(64), n=2)
    got = top(tiny_model, sae, iter(tokens.split(sizes)), range(64), n=2)
    assert_same(got, want)
    # The last row is the first once more: the first comes first, and may leave no place.
    ties = [[c.passage for c in one.contexts] for one in got]
    assert any(passages == [0, 6] for passages in ties)
    assert not any(passages[0] == 6 for passages in ties if passages)


@pytest.mark.parametrize("window", [3, 50])
def test_rows_of_other_lengths_and_of_one_token(
    tiny_model: HookedSAETransformer, make_sae: Any, make_tokens: Any, window: int
):
    sae = make_sae("standard")
    parts = [
        make_tokens(1, length=9),
        make_tokens(2, length=20),
        make_tokens(3)[:, 5:6],
    ]
    got = top(tiny_model, sae, parts, range(20), n=30, window=window)
    for one in got:
        want = []
        for i, part in enumerate(parts):
            hits = by_hand(tiny_model, sae, part, one.latent, 30, window).contexts
            want += [(c.activation, c.passage + 7 * i, c.peak, c.tokens) for c in hits]
        want.sort(key=lambda hit: -hit[0])
        found = [(c.passage, c.peak, c.tokens) for c in one.contexts]
        assert found == [h[1:] for h in want]
    lengths = {len(c.tokens) for one in got for c in one.contexts}
    assert lengths >= ({1, 7} if window == 3 else {1, 9, 20})


@pytest.mark.parametrize(
    ("exclude", "ids"), [(False, ()), ([BOS, 40, 41], (BOS, 40, 41))]
)
def test_excluded_tokens_can_be_chosen(
    tiny_model: HookedSAETransformer,
    make_sae: Any,
    make_tokens: Any,
    exclude: Any,
    ids: tuple[int, ...],
):
    sae, tokens = make_sae("standard"), make_tokens()
    got = top(tiny_model, sae, [tokens], [2], n=9, exclude_special_tokens=exclude)
    assert_same(got, [by_hand(tiny_model, sae, tokens, 2, 9, 10, ids)])
    assert got[0].contexts


@pytest.mark.parametrize(
    ("limit", "rows"), [(64 * 10 + 63, [10] * 11 + [2]), (1, [1] * 112)]
)
def test_only_a_part_of_a_batch_is_encoded_at_a_time(
    tiny_model: HookedSAETransformer,
    make_sae: Any,
    make_tokens: Any,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    rows: list[int],
):
    sae, tokens = make_sae(), make_tokens()
    want = top(tiny_model, sae, [tokens], [3, 4, 5])
    encoded = []
    encode = sae.encode
    monkeypatch.setattr(sae, "encode", lambda x: encoded.append(len(x)) or encode(x))
    monkeypatch.setattr(activations, "_MAX_ACTIVATIONS", limit)
    assert_same(top(tiny_model, sae, [tokens], [3, 4, 5]), want)
    assert encoded == rows


def test_a_store_is_read_to_the_end_of_its_data_set(
    tiny_model: HookedSAETransformer, make_sae: Any
):
    sae = make_sae()
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
    tiny_model: HookedSAETransformer, make_sae: Any, make_tokens: Any, one_head: bool
):
    hook, tokens = "blocks.0.attn.hook_z", make_tokens()
    z = tiny_model.run_with_cache(tokens, names_filter=hook)[1][hook]
    if one_head:
        sae, x = make_sae(hook=hook, d_in=8), z[:, :, 2]
        sae.cfg.metadata.hook_head_index = 2
    else:
        sae, x = make_sae(hook=hook, reshape_activations="hook_z"), z
    got = top(tiny_model, sae, [tokens], range(64), n=1, exclude_special_tokens=False)
    # The SAE still joins heads itself, if it did before.
    with torch.no_grad():
        want = sae.encode(x).amax((0, 1)).tolist()
    peaks = [one.contexts[0].activation if one.contexts else 0.0 for one in got]
    assert peaks == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("architecture", ["scale", "topk", "standard"])
def test_activations_that_are_not_finite_are_refused_unless_excluded(
    tiny_model: HookedSAETransformer,
    make_sae: Any,
    make_tokens: Any,
    overflowing: Any,
    architecture: str,
):
    sae, tokens = make_sae(architecture), make_tokens()
    want = top(tiny_model, sae, [tokens], range(64))
    # The first token is a BOS.
    with tiny_model.hooks(fwd_hooks=[(HOOK, overflowing(0))]):
        assert_same(top(tiny_model, sae, [tokens], range(64)), want)
    message = r"activations must be finite.* in batch 0, at token \(0, 5\)"
    with (
        tiny_model.hooks(fwd_hooks=[(HOOK, overflowing(5))]),
        pytest.raises(ValueError, match=message),
    ):
        # Whichever latents are asked for.
        top(tiny_model, sae, [tokens], [3])
    sae.W_enc.data[:, 7] = torch.nan
    stream = latent_activations(tiny_model, sae, [tokens], [3])
    with pytest.raises(ValueError, match="activations must be finite"):
        next(stream)


def test_a_transcoder_is_read_at_its_input(
    tiny_model: HookedSAETransformer, make_sae: Any, make_tokens: Any
):
    sae = make_sae("transcoder", d_out=32, apply_b_dec_to_input=False)
    sae.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    tokens = make_tokens()
    got = top(tiny_model, sae, [tokens], range(20), n=3)
    assert_same(got, [by_hand(tiny_model, sae, tokens, i, 3, 10) for i in range(20)])


@pytest.mark.parametrize(
    "make", [iter, torch.tensor, lambda latents: (i for i in latents)]
)
def test_latents_may_come_in_anything_that_holds_integers(
    tiny_model: HookedSAETransformer, make_sae: Any, make_tokens: Any, make: Any
):
    sae, tokens = make_sae(), make_tokens()
    want = top(tiny_model, sae, [tokens], [3, 1, 4])
    assert top(tiny_model, sae, [tokens.numpy()], make([3, 1, 4])) == want
    assert [one.latent for one in want] == [3, 1, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": [3.7]}, r"latents must be a list of integers, got \[3\.7\]"),
        ({"window": 2.0}, r"window must be an integer, got 2\.0"),
        ({"latents": []}, r"latents must name .* got \[\]"),
        ({"latents": [3, 4, 3]}, r"latents must name .* got \[3, 4, 3\]"),
        ({"latents": [64]}, r"latents must be in range\(64\), got \[64\]"),
        ({"latents": [0, -1]}, r"latents must be in range\(64\), got \[0, -1\]"),
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"window": -1}, "window must be at least 0, got -1"),
        ({"max_batches": 0}, "max_batches must be at least 1, got 0"),
        ({"tokens": []}, "tokens must hold at least one batch, got none"),
        ({"tokens": torch.ones(7, 16).long()}, r"tokens must be .* shape \(16,\)"),
        ({"tokens": [torch.rand(2, 4)]}, "tokens must be batches .* torch.float32"),
        ({"tokens": [torch.ones(2, 0).long()]}, r"tokens must be batches .*\(2, 0\)"),
    ],
)
def test_bad_arguments_are_refused(
    tiny_model: HookedSAETransformer,
    make_sae: Any,
    make_tokens: Any,
    change: dict[str, Any],
    message: str,
):
    arguments = {"tokens": [make_tokens()], "latents": [1]} | change
    with pytest.raises(ValueError, match=message):
        top(tiny_model, make_sae(), **arguments)


def test_a_model_that_lacks_the_hook_or_a_tokenizer_is_refused(
    tiny_model: HookedSAETransformer,
    make_sae: Any,
    make_tokens: Any,
    monkeypatch: pytest.MonkeyPatch,
):
    sae = make_sae(hook="blocks.7.hook_resid_post")
    with pytest.raises(ValueError, match="hook_name must be .* 'blocks.7.hook_resid"):
        top(tiny_model, sae, [make_tokens()], [1])
    monkeypatch.setattr(tiny_model, "tokenizer", None)
    with pytest.raises(ValueError, match="the text of contexts needs .* got none"):
        top(tiny_model, make_sae(), [], [1], exclude_special_tokens=False)
    stream = latent_activations(tiny_model, make_sae(), [make_tokens()], [1])
    with pytest.raises(ValueError, match="exclude_special_tokens=True needs .* none"):
        next(stream)


def test_neither_the_default_device_nor_the_type_of_a_number_matters(
    tiny_model: HookedSAETransformer, make_sae: Any, make_tokens: Any
):
    sae, batches = make_sae(), [make_tokens().tolist(), make_tokens(1)]
    want = top(tiny_model, sae, batches, [3, 1], n=2, window=2)
    # Of NumPy's unsigned numbers, -2 is none.
    numbers: Any = {"n": np.uint8(2), "window": np.uint8(2)}
    with torch.device("meta"):
        got = top(tiny_model, sae, batches, [3, 1], **numbers)
    assert got == want

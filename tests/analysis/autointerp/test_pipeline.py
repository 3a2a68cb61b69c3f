"""Automated interpretability, through delphi itself, with judges whose verdicts are known."""

import asyncio
import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from helpers import randomize
from sae_lens import HookedSAETransformer
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

from sae_lens_scale import ScaleSAE, ScaleSAEConfig, SwitchSAE, SwitchSAEConfig
from sae_lens_scale.analysis.autointerp import (
    AutointerpSettings,
    Interpretability,
    SkippedLatent,
    autointerp,
)
from sae_lens_scale.analysis.autointerp.delphi_modules import load_delphi

pytestmark = pytest.mark.usefixtures("delphi")

HOOK = "blocks.0.hook_resid_post"
LENGTH = 8
SETTINGS = AutointerpSettings(
    passage_length=LENGTH,
    n_quantiles=4,
    passages_per_quantile=2,
    non_activating=7,
    explained_passages=6,
    min_passages=20,
    passages_per_prompt=5,
)


SAES: dict[str, Callable[[], Any]] = {
    "scale": lambda: ScaleSAE(ScaleSAEConfig(d_in=32, d_sae=64, num_experts=4, k=6)),
    "switch": lambda: SwitchSAE(SwitchSAEConfig(d_in=32, d_sae=64, num_experts=4, k=6)),
    "topk": lambda: TopKSAE(TopKSAEConfig(d_in=32, d_sae=64, k=6)),
}


def make_sae(architecture: str = "scale") -> Any:
    sae = SAES[architecture]()
    randomize(sae)
    sae.cfg.metadata.hook_name = HOOK
    return sae


@pytest.fixture(scope="module")
def tokens(tiny_model: HookedSAETransformer) -> torch.Tensor:
    """Random words: no two passages are alike, and none has a line break."""
    assert tiny_model.tokenizer is not None
    decode = tiny_model.tokenizer.decode
    words = [i for i in range(3_000) if re.fullmatch(r" [a-z]+", str(decode([i])))]
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(words)[
        torch.randint(len(words), (40, 4 * LENGTH), generator=generator)
    ]


@dataclass
class Passage:
    text: str
    words: list[str]
    acts: list[float]

    @property
    def peak(self) -> float:
        return max(self.acts)


@pytest.fixture(scope="module")
def words(tiny_model: HookedSAETransformer, tokens: torch.Tensor) -> list[list[str]]:
    """Each passage's words."""
    text = {int(i): str(tiny_model.to_string([int(i)])) for i in tokens.unique()}
    return [[text[i] for i in ids] for ids in tokens.reshape(-1, LENGTH).tolist()]


@torch.no_grad()
def activations(
    model: HookedSAETransformer, sae: Any, tokens: torch.Tensor
) -> torch.Tensor:
    """[passages, words, latents]"""
    _, cache = model.run_with_cache(tokens, names_filter=HOOK)
    return sae.encode(cache[HOOK]).reshape(-1, LENGTH, 64)


@pytest.fixture
def passages_of(
    tiny_model: HookedSAETransformer, tokens: torch.Tensor, words: list[list[str]]
) -> Callable[[Any, int], list[Passage]]:
    def passages(sae: Any, latent: int) -> list[Passage]:
        acts = activations(tiny_model, sae, tokens)[..., latent].tolist()
        return [Passage("".join(w), w, a) for w, a in zip(words, acts, strict=True)]

    return passages


def judgeable(
    model: HookedSAETransformer, sae: Any, tokens: torch.Tensor, n: int = 1
) -> list[int]:
    """Latents that fire in some passages, and not in all of them."""
    fires = (activations(model, sae, tokens).amax(1) > 0).sum(0)
    found = (fires >= SETTINGS.min_passages) & (fires <= 4 * len(tokens) - 10)
    assert found.sum() >= n
    return found.nonzero().flatten()[:n].tolist()


def stage_of(messages: list[dict[str, str]]) -> str:
    if "[EXPLANATION]" in messages[0]["content"]:
        return "explain"
    return "fuzzing" if "<<" in messages[0]["content"] else "detection"


@dataclass
class FakeJudge:
    """Explains everything alike, and answers 1 for the passages that ``says`` names."""

    says: Callable[[str, str], bool]
    asked: dict[str, list[list[str]]] = field(
        default_factory=lambda: {"explain": [], "detection": [], "fuzzing": []}
    )

    def __call__(self, messages: list[dict[str, str]]) -> str:
        stage = stage_of(messages)
        content = messages[-1]["content"]
        if stage == "explain":
            self.asked[stage].append(content.strip("\n").split("\n"))
            return "I think it is clear.\n[EXPLANATION]: words\n"
        assert content.startswith("Latent explanation: words\n")
        texts = re.findall(r"^Example \d+: (.*)$", content, re.MULTILINE)
        self.asked[stage].append(texts)
        return f"Here you are: {[int(self.says(stage, text)) for text in texts]}"


def run(
    model: HookedSAETransformer,
    sae: Any,
    tokens: Any,
    latents: Any,
    judge: Any,
    **kw: Any,
) -> Interpretability:
    tokens = [tokens] if isinstance(tokens, torch.Tensor) else tokens
    settings = kw.pop("settings", SETTINGS)
    return autointerp(model, sae, tokens, latents, judge, settings, verbose=False, **kw)


def plain(text: str) -> str:
    return text.replace("<<", "").replace(">>", "")


@pytest.mark.parametrize("architecture", list(SAES))
def test_a_judge_that_knows_strong_passages_only_is_right_about_strong_quantiles(
    tiny_model: HookedSAETransformer,
    tokens: torch.Tensor,
    architecture: str,
    passages_of: Any,
):
    sae = make_sae(architecture)
    (latent,) = judgeable(tiny_model, sae, tokens)
    passages = {p.text: p for p in passages_of(sae, latent)}
    # By hand: strongest first, every second one judged, in four parts of equal size.
    judged = sorted((p.peak for p in passages.values() if p.peak > 0), reverse=True)
    judged = judged[1::2]
    part = len(judged) // 4
    known = judged[2 * part - 1]
    judge = FakeJudge(lambda stage, text: passages[plain(text)].peak >= known)
    result = run(tiny_model, sae, tokens, [latent], judge)
    (one,) = result.latents
    assert (one.latent, one.explanation) == (latent, "words")
    for scores in (one.detection, one.fuzzing, result.detection, result.fuzzing):
        assert scores.quantiles == ["not", 1, 2, 3, 4]
        assert scores.accuracy == [1.0, 0.0, 0.0, 1.0, 1.0]
        assert scores.correct == [7, 0, 0, 2, 2]
        assert scores.answered == scores.asked == [7, 2, 2, 2, 2]
    assert result.passages == 160
    assert result.skipped == []
    for stage in ("detection", "fuzzing"):
        assert [len(texts) for texts in judge.asked[stage]] == [5, 5, 5]
        peaks = [passages[plain(t)].peak for texts in judge.asked[stage] for t in texts]
        places = sorted(judged.index(peak) // part for peak in peaks if peak > 0)
        assert places == [0, 0, 1, 1, 2, 2, 3, 3]
        assert len(set(peaks)) == 8 + 1
    assert json.loads(json.dumps(asdict(result)))["latents"][0]["latent"] == latent


def test_the_strongest_passages_are_explained_and_none_of_them_judged(
    tiny_model: HookedSAETransformer, tokens: torch.Tensor, passages_of: Any
):
    sae = make_sae()
    (latent,) = judgeable(tiny_model, sae, tokens)
    passages = passages_of(sae, latent)
    passages.sort(key=lambda p: -p.peak)
    judge = FakeJudge(lambda stage, text: True)
    run(tiny_model, sae, tokens, [latent], judge)
    (lines,) = judge.asked["explain"]
    shown = [plain(line) for line in lines[::2]]
    assert shown == [p.text for p in passages[:12:2]]
    judged = {
        plain(text)
        for stage in ("detection", "fuzzing")
        for texts in judge.asked[stage]
        for text in texts
    }
    assert len(judged) >= 8
    assert not judged & {p.text for p in passages[:12:2]}


def test_tokens_that_fire_the_latent_are_marked(
    tiny_model: HookedSAETransformer, tokens: torch.Tensor, passages_of: Any
):
    sae = make_sae()
    (latent,) = judgeable(tiny_model, sae, tokens)
    passages = {p.text: p for p in passages_of(sae, latent)}

    def marked(passage: Passage) -> str:
        on = [a >= 0.3 * passage.peak for a in passage.acts]
        words = (f"<<{w}>>" if o else w for w, o in zip(passage.words, on, strict=True))
        return "".join(words).replace(">><<", "")

    judge = FakeJudge(lambda stage, text: True)
    run(tiny_model, sae, tokens, [latent], judge)
    (lines,) = judge.asked["explain"]
    for line in lines[::2]:
        assert line == marked(passages[plain(line)])
    fuzzed = [text for texts in judge.asked["fuzzing"] for text in texts]
    right = [text for text in fuzzed if passages[plain(text)].peak > 0]
    assert len(right) == 8
    for text in right:
        assert text == marked(passages[plain(text)])
    # Elsewhere whole tokens are marked, too, though none fires.
    for text in set(fuzzed) - set(right):
        assert "<<" in text
        assert re.fullmatch(r"(( [a-z]+)|(<<( [a-z]+)+>>))+", text)
    for texts in judge.asked["detection"]:
        assert not any("<<" in text for text in texts)


def test_results_depend_neither_on_batches_nor_on_concurrency(
    tiny_model: HookedSAETransformer, tokens: torch.Tensor
):
    sae = make_sae()
    latents = judgeable(tiny_model, sae, tokens, n=3)

    def says(stage: str, text: str) -> bool:
        return sum(map(ord, text)) % 3 == 0

    want = run(tiny_model, sae, tokens, latents, FakeJudge(says))
    assert [one.latent for one in want.latents] == latents
    assert want.detection.asked == [21, 6, 6, 6, 6]
    assert 0 < sum(want.fuzzing.correct) < 45
    parts = tokens.split([1, 30, 9])
    got = run(tiny_model, sae, parts, latents, FakeJudge(says), concurrency=3)
    assert got == want
    for i in range(5):
        right = sum(one.detection.correct[i] for one in want.latents)
        assert want.detection.accuracy[i] == right / want.detection.answered[i]


def test_it_runs_in_a_notebook_and_leaves_random_numbers_alone(
    tiny_model: HookedSAETransformer, tokens: torch.Tensor
):
    sae = make_sae()
    latents = judgeable(tiny_model, sae, tokens)

    async def cell() -> Interpretability:
        judge = FakeJudge(lambda stage, text: True)
        return run(tiny_model, sae, tokens, latents, judge)

    before = random.getstate(), torch.get_rng_state()
    result = asyncio.run(cell())
    assert result.detection.accuracy == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_answers_that_cannot_be_read_are_counted_as_such(
    tiny_model: HookedSAETransformer, tokens: torch.Tensor
):
    sae = make_sae()
    latents = judgeable(tiny_model, sae, tokens)
    replies = {
        "explain": "[EXPLANATION]: words",
        "detection": "No idea.",
        "fuzzing": "[1, 0]",
    }
    result = run(tiny_model, sae, tokens, latents, lambda m: replies[stage_of(m)])
    for scores in (result.detection, result.fuzzing):
        assert scores.accuracy == [None] * 5
        assert scores.answered == [0] * 5
        assert scores.asked == [7, 2, 2, 2, 2]


@pytest.mark.parametrize("reply", ["words", "", "[EXPLANATION]:  "])
def test_a_latent_without_an_explanation_is_not_judged(
    tiny_model: HookedSAETransformer, tokens: torch.Tensor, reply: str
):
    sae = make_sae()
    (latent,) = judgeable(tiny_model, sae, tokens)
    asked = []
    result = run(
        tiny_model, sae, tokens, [latent], lambda m: asked.append(stage_of(m)) or reply
    )
    assert asked == ["explain"]
    assert result.latents == []
    reason = "the judge's reply held no explanation"
    assert result.skipped == [SkippedLatent(latent, reason)]
    assert result.detection.asked == [0] * 5
    assert result.detection.accuracy == [None] * 5


def test_latents_that_fire_too_rarely_or_nearly_always_are_skipped(
    tiny_model: HookedSAETransformer, tokens: torch.Tensor, passages_of: Any
):
    sae = make_sae("topk")
    (latent,) = judgeable(tiny_model, sae, tokens)
    dead, always = (i for i in range(3) if i != latent) if latent < 2 else (0, 1)
    sae.b_enc.data[dead] = -1_000
    sae.b_enc.data[always] = 1_000
    fires = [p for p in passages_of(sae, latent) if p.peak > 0]
    judge = FakeJudge(lambda stage, text: True)
    result = run(tiny_model, sae, tokens, [dead, latent, always], judge)
    assert [one.latent for one in result.latents] == [latent]
    assert result.skipped == [
        SkippedLatent(dead, "fires in 0 passages, fewer than 20"),
        SkippedLatent(always, "is silent in 0 passages, fewer than 7"),
    ]
    few = replace(SETTINGS, min_passages=len(fires) + 1)
    result = run(tiny_model, sae, tokens, [latent], judge, settings=few)
    reason = f"fires in {len(fires)} passages, fewer than {len(fires) + 1}"
    assert result.skipped == [SkippedLatent(latent, reason)]


@pytest.mark.parametrize("stage", ["explain", "detection", "fuzzing"])
@pytest.mark.parametrize("concurrency", [1, 2])
def test_what_the_judge_raises_ends_the_run(
    tiny_model: HookedSAETransformer,
    tokens: torch.Tensor,
    stage: str,
    concurrency: int,
):
    sae = make_sae()
    latents = judgeable(tiny_model, sae, tokens, n=3)
    works = FakeJudge(lambda stage, text: True)

    def judge(messages: list[dict[str, str]]) -> str:
        if stage_of(messages) == stage:
            raise ConnectionError("gone")
        return works(messages)

    state = random.getstate()
    with pytest.raises(ConnectionError, match="gone"):
        run(tiny_model, sae, tokens, latents, judge, concurrency=concurrency)
    assert random.getstate() == state


def test_what_is_left_over_at_the_end_of_a_row_is_dropped(
    tiny_model: HookedSAETransformer, tokens: torch.Tensor
):
    sae = make_sae()
    latents = judgeable(tiny_model, sae, tokens)
    judge = FakeJudge(lambda stage, text: True)
    short = tokens[:2, : LENGTH - 1]
    whole = run(tiny_model, sae, tokens, latents, judge)
    longer = torch.cat([tokens, tokens[:, : LENGTH - 1]], dim=1)
    assert run(tiny_model, sae, [short, longer], latents, judge) == whole
    with pytest.raises(
        ValueError, match="tokens must have rows of at least .*=8 .*none"
    ):
        run(tiny_model, sae, [short], latents, judge)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passage_length": 1}, "passage_length must be at least 2, got 1"),
        ({"n_quantiles": 0}, "n_quantiles must be at least 1, got 0"),
        ({"passages_per_quantile": 0}, "passages_per_quantile must .* got 0"),
        ({"non_activating": 1}, "non_activating must be at least 2, got 1"),
        ({"explained_passages": 0}, "explained_passages must .* got 0"),
        ({"passages_per_prompt": 0}, "passages_per_prompt must .* got 0"),
        ({"passages_per_prompt": 7}, "passages_per_prompt must divide .* = 100, got 7"),
        ({"explained_from": "weakest"}, "explained_from must be .* got 'weakest'"),
        ({"min_passages": 99}, "min_passages must be at least 100, .* got 99"),
        (
            {"explained_passages": 101},
            "min_passages must be at least 202, .* got 200",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    change: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        AutointerpSettings(**change)


def test_bad_arguments_are_refused(
    tiny_model: HookedSAETransformer, tokens: torch.Tensor
):
    judge = FakeJudge(lambda stage, text: True)
    with pytest.raises(ValueError, match="concurrency must be at least 1, got 0"):
        run(tiny_model, make_sae(), tokens, [1], judge, concurrency=0)
    with pytest.raises(ValueError, match=r"latents must be in range\(64\), got \[64\]"):
        run(tiny_model, make_sae(), tokens, [64], judge)


def test_delphi_is_imported_without_the_packages_that_nothing_here_uses():
    missing = [
        n for n in ("vllm", "faiss", "sentence_transformers") if not find_spec(n)
    ]
    load_delphi()
    assert not [name for name in missing if name in sys.modules]
    if "vllm" in missing:
        clients = import_module("delphi.clients")
        with pytest.raises(ImportError, match="needs vllm, which is not installed"):
            clients.Offline("model")


def test_without_delphi_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(sys.modules, "delphi.latents", None)
    with pytest.raises(ImportError, match="pip install --no-deps eai-delphi==0.1.3"):
        load_delphi.__wrapped__()
    assert not [n for n in ("vllm", "vllm.inputs") if n in sys.modules]

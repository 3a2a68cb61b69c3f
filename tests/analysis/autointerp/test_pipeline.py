"""Automated interpretability, through delphi itself, with judges whose verdicts are known."""

import asyncio
import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import HookedSAETransformer

from sae_lens_scale.analysis.autointerp import (
    AutointerpSettings,
    Interpretability,
    SkippedLatent,
    autointerp,
)
from sae_lens_scale.analysis.autointerp.delphi_modules import load_delphi
from sae_lens_scale.analysis.contexts import latent_activations
from sae_lens_scale.analysis.language_model import token_strings

pytestmark = pytest.mark.usefixtures("delphi")

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

Run = Callable[..., Interpretability]


@dataclass
class Passage:
    text: str
    words: list[str]
    acts: list[float]

    @property
    def peak(self) -> float:
        return max(self.acts)


Passages = Callable[[int], list[Passage]]


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


@pytest.fixture(scope="module")
def words(tiny_model: HookedSAETransformer, tokens: torch.Tensor) -> list[list[str]]:
    """Each passage's words."""
    text = {int(i): str(tiny_model.to_string([int(i)])) for i in tokens.unique()}
    return [[text[i] for i in ids] for ids in tokens.reshape(-1, LENGTH).tolist()]


@pytest.fixture
def sae(request: pytest.FixtureRequest, make_sae: Any) -> Any:
    """A random SAE, of the architecture that the test names or a Scale SAE."""
    return make_sae(getattr(request, "param", "scale"))


@pytest.fixture
def passages(
    tiny_model: HookedSAETransformer,
    sae: Any,
    tokens: torch.Tensor,
    words: list[list[str]],
) -> Passages:
    """Function from a latent to all passages, with the magnitude of its activations."""
    hook = sae.cfg.metadata.hook_name
    _, cache = tiny_model.run_with_cache(tokens, names_filter=hook)

    @torch.no_grad()
    def of_latent(latent: int) -> list[Passage]:
        acts = sae.encode(cache[hook])[..., latent].abs().reshape(-1, LENGTH).tolist()
        return [Passage("".join(w), w, a) for w, a in zip(words, acts, strict=True)]

    return of_latent


@pytest.fixture
def latents(passages: Passages) -> list[int]:
    """Three latents that fire in some passages, and not in all of them."""

    def fires(latent: int) -> int:
        return sum(passage.peak > 0 for passage in passages(latent))

    some = (i for i in range(64) if SETTINGS.min_passages <= fires(i) <= 150)
    return [next(some) for _ in range(3)]


@pytest.fixture
def run(tiny_model: HookedSAETransformer, sae: Any, tokens: torch.Tensor) -> Run:
    """Function that interprets latents of the SAE."""

    def run(
        latents: list[int],
        judge: Any,
        corpus: Any = (tokens,),
        settings: AutointerpSettings = SETTINGS,
        **options: Any,
    ) -> Interpretability:
        return autointerp(
            tiny_model, sae, corpus, latents, judge, settings, verbose=False, **options
        )

    return run


def stage_of(messages: list[dict[str, str]]) -> str:
    if "[EXPLANATION]" in messages[0]["content"]:
        return "explain"
    return "fuzzing" if "<<" in messages[0]["content"] else "detection"


@dataclass
class FakeJudge:
    """Explains everything alike, and answers 1 for the passages that ``says`` names."""

    says: Callable[[str, str], bool] = lambda stage, text: True
    asked: dict[str, list[list[str]]] = field(default_factory=lambda: defaultdict(list))

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


def plain(text: str) -> str:
    return text.replace("<<", "").replace(">>", "")


@pytest.mark.parametrize("sae", ["scale", "switch", "topk", "abstopk"], indirect=True)
def test_a_judge_that_knows_strong_passages_only_is_right_about_strong_quantiles(
    run: Run, latents: list[int], passages: Passages
):
    latent = latents[0]
    by_text = {p.text: p for p in passages(latent)}
    # By hand: strongest first, every second one judged, in four parts of equal size.
    judged = sorted((p.peak for p in by_text.values() if p.peak > 0), reverse=True)
    judged = judged[1::2]
    part = len(judged) // 4
    known = judged[2 * part - 1]
    judge = FakeJudge(lambda stage, text: by_text[plain(text)].peak >= known)
    result = run([latent], judge)
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
        peaks = [by_text[plain(t)].peak for texts in judge.asked[stage] for t in texts]
        places = sorted(judged.index(peak) // part for peak in peaks if peak > 0)
        assert places == [0, 0, 1, 1, 2, 2, 3, 3]
        assert len(set(peaks)) == 8 + 1
    assert json.loads(json.dumps(asdict(result)))["latents"][0]["latent"] == latent


def test_the_strongest_passages_are_explained_and_none_of_them_judged(
    run: Run, latents: list[int], passages: Passages
):
    strongest = sorted(passages(latents[0]), key=lambda p: -p.peak)
    judge = FakeJudge()
    run(latents[:1], judge)
    (lines,) = judge.asked["explain"]
    shown = [plain(line) for line in lines[::2]]
    assert shown == [p.text for p in strongest[:12:2]]
    prompts = judge.asked["detection"] + judge.asked["fuzzing"]
    judged = {plain(text) for texts in prompts for text in texts}
    assert len(judged) >= 8
    assert not judged & set(shown)


def test_tokens_that_fire_the_latent_are_marked(
    run: Run, latents: list[int], passages: Passages
):
    by_text = {p.text: p for p in passages(latents[0])}

    def marked(passage: Passage) -> str:
        on = [a >= 0.3 * passage.peak for a in passage.acts]
        words = (f"<<{w}>>" if o else w for w, o in zip(passage.words, on, strict=True))
        return "".join(words).replace(">><<", "")

    judge = FakeJudge()
    run(latents[:1], judge)
    (lines,) = judge.asked["explain"]
    for line in lines[::2]:
        assert line == marked(by_text[plain(line)])
    fuzzed = [text for texts in judge.asked["fuzzing"] for text in texts]
    right = [text for text in fuzzed if by_text[plain(text)].peak > 0]
    assert len(right) == 8
    for text in right:
        assert text == marked(by_text[plain(text)])
    # Elsewhere whole tokens are marked, too, though none fires.
    for text in set(fuzzed) - set(right):
        assert "<<" in text
        assert re.fullmatch(r"(( [a-z]+)|(<<( [a-z]+)+>>))+", text)
    for texts in judge.asked["detection"]:
        assert not any("<<" in text for text in texts)


def test_results_depend_neither_on_batches_nor_on_concurrency(
    run: Run, latents: list[int], tokens: torch.Tensor
):
    judge = FakeJudge(lambda stage, text: sum(map(ord, text)) % 3 == 0)
    want = run(latents, judge)
    assert [one.latent for one in want.latents] == latents
    assert want.detection.asked == [21, 6, 6, 6, 6]
    assert 0 < sum(want.fuzzing.correct) < 45
    assert run(latents, judge, tokens.split([1, 30, 9]), concurrency=3) == want
    for i in range(5):
        right = sum(one.detection.correct[i] for one in want.latents)
        assert want.detection.accuracy[i] == right / want.detection.answered[i]


def test_it_runs_in_a_notebook_and_leaves_random_numbers_alone(
    run: Run, latents: list[int]
):
    async def cell() -> Interpretability:
        return run(latents[:1], FakeJudge(lambda stage, text: stage == "fuzzing"))

    before = random.getstate(), torch.get_rng_state()
    result = asyncio.run(cell())
    assert result.detection.accuracy == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert result.fuzzing.accuracy == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_answers_that_cannot_be_read_are_counted_as_such(run: Run, latents: list[int]):
    replies = {
        "explain": "[EXPLANATION]: words",
        "detection": "No idea.",
        "fuzzing": "[1, 0]",
    }
    result = run(latents[:1], lambda m: replies[stage_of(m)])
    for scores in (result.detection, result.fuzzing):
        assert scores.accuracy == [None] * 5
        assert scores.answered == [0] * 5
        assert scores.asked == [7, 2, 2, 2, 2]


@pytest.mark.parametrize("reply", ["words", "", "[EXPLANATION]:  "])
def test_a_latent_without_an_explanation_is_not_judged(
    run: Run, latents: list[int], reply: str
):
    asked = []
    result = run(latents[:1], lambda m: asked.append(stage_of(m)) or reply)
    assert asked == ["explain"]
    assert result.latents == []
    reason = "the judge's reply held no explanation"
    assert result.skipped == [SkippedLatent(latents[0], reason)]
    assert result.detection.asked == [0] * 5
    assert result.detection.accuracy == [None] * 5


@pytest.mark.parametrize("sae", ["topk"], indirect=True)
def test_latents_that_fire_too_rarely_or_nearly_always_are_skipped(
    run: Run, sae: Any, latents: list[int], passages: Passages
):
    dead, latent, always = latents
    sae.b_enc.data[dead] = -1_000
    sae.b_enc.data[always] = 1_000
    fires = sum(p.peak > 0 for p in passages(latent))
    result = run(latents, FakeJudge())
    assert [one.latent for one in result.latents] == [latent]
    assert result.skipped == [
        SkippedLatent(dead, "fires in 0 passages, fewer than 20"),
        SkippedLatent(always, "is silent in 0 passages, fewer than 7"),
    ]
    few = replace(SETTINGS, min_passages=fires + 1)
    result = run([latent], FakeJudge(), settings=few)
    reason = f"fires in {fires} passages, fewer than {fires + 1}"
    assert result.skipped == [SkippedLatent(latent, reason)]


@pytest.mark.parametrize("stage", ["explain", "detection", "fuzzing"])
@pytest.mark.parametrize("concurrency", [1, 2])
def test_exceptions_of_the_judge_end_the_run(
    run: Run, latents: list[int], stage: str, concurrency: int
):
    works = FakeJudge()

    def judge(messages: list[dict[str, str]]) -> str:
        if stage_of(messages) == stage:
            raise ConnectionError("gone")
        return works(messages)

    state = random.getstate()
    with pytest.raises(ConnectionError, match="gone"):
        run(latents, judge, concurrency=concurrency)
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda: next(iter([])), RuntimeError, "the judge raised StopIteration"),
        (lambda: b"[1]", ValueError, "judge must return text, got bytes"),
    ],
)
def test_a_judge_that_runs_out_of_replies_or_returns_no_text_ends_the_run(
    run: Run, latents: list[int], bad: Any, error: type[Exception], message: str
):
    works = FakeJudge()
    with pytest.raises(error, match=message):
        run(latents[:1], lambda m: bad() if stage_of(m) == "fuzzing" else works(m))


def test_a_refused_request_is_an_empty_reply(run: Run, latents: list[int]):
    works = FakeJudge()
    result = run(latents[:1], lambda m: works(m) if stage_of(m) != "fuzzing" else None)
    assert result.detection.answered == [7, 2, 2, 2, 2]
    assert result.fuzzing.answered == [0] * 5


def test_neither_the_default_device_nor_the_type_of_a_setting_matters(
    run: Run, latents: list[int]
):
    want = run(latents[:1], FakeJudge())
    numbers: Any = asdict(SETTINGS)
    for name in numbers.keys() - {"explained_from"}:
        numbers[name] = np.int64(numbers[name])
    with torch.device("meta"):
        got = run(latents[:1], FakeJudge(), settings=AutointerpSettings(**numbers))
    assert json.dumps(asdict(got)) == json.dumps(asdict(want))


def test_tokens_left_over_at_the_end_of_a_row_are_dropped(
    run: Run, latents: list[int], tokens: torch.Tensor
):
    short = tokens[:2, : LENGTH - 1]
    whole = run(latents[:1], FakeJudge())
    longer = torch.cat([tokens, tokens[:, : LENGTH - 1]], dim=1)
    assert run(latents[:1], FakeJudge(), [short, longer]) == whole
    with pytest.raises(ValueError, match="rows of at least .*=8 tokens, got none"):
        run(latents[:1], FakeJudge(), [short])


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
        ({"min_passages": 200.5}, "min_passages must be an integer, got 200.5"),
        ({"seed": None}, "seed must be an integer, got None"),
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


def test_models_of_all_kinds_are_read(kind: Any, make_sae: Any, tokens: torch.Tensor):
    sae = make_sae(hook=kind.hook)
    ((_, acts),) = latent_activations(kind.model, sae, [tokens], range(64))
    peaks = acts.reshape(-1, LENGTH, 64).amax(1)
    fires = (peaks > 0).sum(0)
    latent = int(((fires >= 20) & (fires <= 150)).nonzero()[0])
    judge = FakeJudge()
    result = autointerp(
        kind.model, sae, [tokens], iter([latent]), judge, SETTINGS, verbose=False
    )
    assert [one.latent for one in result.latents] == [latent]
    strongest = tokens.reshape(-1, LENGTH)[peaks[:, latent].argmax()]
    shown = plain(judge.asked["explain"][0][0])
    assert shown == "".join(token_strings(kind.model, strongest))


def test_bad_arguments_are_refused(run: Run):
    with pytest.raises(ValueError, match="judge must be a function .* got 'gpt-4'"):
        run([1], "gpt-4")
    with pytest.raises(ValueError, match="concurrency must be at least 1, got 0"):
        run([1], FakeJudge(), concurrency=0)
    with pytest.raises(ValueError, match="passage_length must be an integer, got 8.0"):
        replace(SETTINGS, passage_length=8.0)
    with pytest.raises(ValueError, match=r"latents must be in range\(64\), got \[64\]"):
        run([64], FakeJudge())


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

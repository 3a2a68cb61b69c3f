"""Passages of an SAE's latents for delphi, and scores of delphi's verdicts."""

import asyncio
import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Event
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_lens_scale.analysis.contexts import latent_activations
from sae_lens_scale.analysis.corpus import Tokens, chosen_latents, require_integer
from sae_lens_scale.analysis.language_model import (
    LanguageModel,
    hook_of,
    token_strings,
    tokenizer_of,
)

from .delphi_modules import load_delphi
from .judges import Judge
from .results import (
    Interpretability,
    LatentInterpretation,
    QuantileScores,
    SkippedLatent,
)
from .settings import AutointerpSettings

# delphi's explanation after a reply that holds none.
_UNREADABLE = "Explanation could not be parsed."


def autointerp(
    model: LanguageModel,
    sae: SAE[Any],
    tokens: Tokens,
    latents: Iterable[int],
    judge: Judge,
    settings: AutointerpSettings | None = None,
    *,
    max_batches: int | None = None,
    exclude_special_tokens: bool | Iterable[int] = True,
    concurrency: int = 1,
    verbose: bool = True,
) -> Interpretability:
    """
    Let a judge explain latents, and measure how well its explanations predict them.

    Appendix A.3 and figure 3d of the Scale SAE paper, by EleutherAI's delphi: the judge
    explains a latent from passages that fire it, and with nothing but its explanation
    tells other passages that fire it from passages that do not (detection), and rightly
    marked passages from wrongly marked ones (fuzzing). A score says as much about the
    judge as about the SAE: compare only scores by the same judge on the same corpus and
    settings.

    Unlike in delphi's own pipeline, no passage is both explained and judged: every
    second one, by strength, is kept for judging. The strength of a negative activation is
    its magnitude.

    Args:
        model: The language model that the SAE was trained on, as for
            :func:`.top_activating_contexts`.
        sae: A mixture or any other SAE or transcoder of SAELens, its normalisation folded
            in, whose metadata names its hook.
        tokens: The corpus, as for :func:`.top_activating_contexts`. It is kept in memory,
            4 bytes per token, with the latents' activations that are not 0. delphi
            recommends 10 million tokens.
        latents: Indices in ``range(d_sae)``; choose them at random for a score of the
            SAE.
        judge: The language model that explains and judges; see :func:`.openai_judge` and
            :func:`.local_judge`.
        settings: Cutting, choice and number of passages; by default delphi's own settings,
            with explanations from the strongest passages.
        max_batches: Stop reading the corpus after so many batches.
        exclude_special_tokens: Ids of tokens that fire nothing; ``True`` for the
            tokenizer's BOS, EOS and their like.
        concurrency: Number of latents before the judge at a time, each in a thread.
        verbose: Show a progress bar.

    Raises:
        ImportError: If delphi is not installed.
        ValueError: If ``concurrency`` is less than 1; if the judge is no function or returns
            no text; if no row of ``tokens`` is as long as a passage; and as
            ``top_activating_contexts``.
        Exception: Any exception of the judge.
    """
    concurrency = require_integer("concurrency", concurrency, 1)
    if not callable(judge):
        raise ValueError(
            f"judge must be a function from chat messages to text, got {judge!r}"
        )
    latents = chosen_latents(latents, sae.cfg.d_sae)
    hook = hook_of(model, sae)
    tokenizer_of(model, "the text of passages")
    settings = settings or AutointerpSettings()
    with _global_generators_kept():
        delphi = load_delphi()
    corpus = _read_corpus(
        tqdm(
            latent_activations(
                model, sae, tokens, latents, max_batches, exclude_special_tokens
            ),
            desc="Activations",
            total=max_batches,
            disable=not verbose,
        ),
        len(latents),
        settings.passage_length,
    )
    records: list[Any] = []
    skipped = []
    # delphi joins tensors of the default device with others on the CPU.
    with _global_generators_kept(), torch.device("cpu"):
        for i, latent in enumerate(latents):
            reason = corpus.shortage(i, settings)
            if reason is None:
                name = delphi.latents.Latent(hook, latent)
                records.append(_record(delphi, model, corpus, i, name, settings))
            else:
                skipped.append(SkippedLatent(latent, reason))
        answers = _interpret(delphi, records, judge, settings, concurrency, verbose)
    done = []
    for record, verdicts in zip(records, answers, strict=True):
        latent = record.latent.latent_index
        if not verdicts:
            skipped.append(
                SkippedLatent(latent, "the judge's reply held no explanation")
            )
            continue
        detection, fuzzing = (_scores(v, settings.n_quantiles) for v in verdicts)
        done.append(
            LatentInterpretation(latent, record.explanation, detection, fuzzing)
        )
    return Interpretability(
        detection=_pooled([one.detection for one in done], settings.n_quantiles),
        fuzzing=_pooled([one.fuzzing for one in done], settings.n_quantiles),
        latents=done,
        skipped=skipped,
        passages=len(corpus.passages),
        settings=settings,
    )


@dataclass(frozen=True)
class _Corpus:
    """Passages ``[passages, passage_length]``, with the activations of each latent."""

    passages: torch.Tensor
    locations: Sequence[torch.Tensor]  # [activations, 2], passage and position
    activations: Sequence[torch.Tensor]  # [activations], magnitudes

    def shortage(self, i: int, settings: AutointerpSettings) -> str | None:
        """Reason why the i-th latent cannot be judged, or None."""
        fires = len(self.locations[i][:, 0].unique())
        if fires < settings.min_passages:
            return f"fires in {fires} passages, fewer than {settings.min_passages}"
        silent = len(self.passages) - fires
        if silent < settings.non_activating:
            return (
                f"is silent in {silent} passages, fewer than {settings.non_activating}"
            )
        return None


def _read_corpus(
    stream: Iterable[tuple[torch.Tensor, torch.Tensor]], num_latents: int, length: int
) -> _Corpus:
    passages, locations, activations = [], [], []
    read = 0
    for ids, acts in stream:
        used = ids.shape[1] // length * length
        cut = ids[:, :used].reshape(-1, length).int()
        fired = acts[:, :used].reshape(-1, length, num_latents)
        where = (fired != 0).nonzero()
        activations.append(fired[where[:, 0], where[:, 1], where[:, 2]].abs())
        where[:, 0] += read
        locations.append(where)
        passages.append(cut)
        read += len(cut)
    if not read:
        raise ValueError(
            f"tokens must have rows of at least passage_length={length} tokens, got none"
        )
    location, activation = torch.cat(locations), torch.cat(activations)
    # Within a latent in the order of the corpus, which delphi needs.
    latent, order = location[:, 2].sort(stable=True)
    sizes = latent.bincount(minlength=num_latents).tolist()
    return _Corpus(
        torch.cat(passages),
        location[order, :2].split(sizes),
        activation[order].split(sizes),
    )


def _record(
    delphi: ModuleType,
    model: LanguageModel,
    corpus: _Corpus,
    i: int,
    name: Any,
    settings: AutointerpSettings,
) -> Any:
    """Make delphi's record of a latent, with the passages to explain and to judge."""
    # Since transformers 5 a tokenizer's own batch_decode joins the tokens of a passage, and
    # delphi would mark the wrong ones.
    tokenizer = SimpleNamespace(batch_decode=partial(token_strings, model))
    record = delphi.latents.constructor(
        delphi.latents.LatentRecord(name),
        delphi.latents.latents.ActivationData(
            corpus.locations[i], corpus.activations[i]
        ),
        delphi.config.ConstructorConfig(
            example_ctx_len=settings.passage_length,
            min_examples=settings.min_passages,
            n_non_activating=settings.non_activating,
            non_activating_source="random",
        ),
        corpus.passages,
        tokenizer,
        seed=settings.seed,
    )
    # Strongest first. delphi would draw both from all of them, with the same seed.
    to_explain, to_judge = record.examples[::2], record.examples[1::2]
    record.train = delphi.latents.samplers.train(
        to_explain,
        record.max_activation,
        settings.explained_passages,
        settings.explained_from,
        settings.n_quantiles,
        settings.seed,
    )
    record.test = delphi.latents.samplers.split_quantiles(
        to_judge,
        settings.n_quantiles,
        settings.n_quantiles * settings.passages_per_quantile,
        settings.seed,
    )
    for example in (*record.train, *record.test):
        example.str_tokens = tokenizer.batch_decode(example.tokens)
    # Only these are needed from here on.
    record.examples = record.examples[:1]
    return record


def _interpret(
    delphi: ModuleType,
    records: list[Any],
    judge: Judge,
    settings: AutointerpSettings,
    concurrency: int,
    verbose: bool,
) -> list[list[list[Any]]]:
    """Explain each record, and get delphi's verdicts of detection and fuzzing, if explained."""
    stopped = Event()

    async def interpret(record: Any) -> list[list[Any]]:
        client = _Client(judge, delphi, stopped)
        explain = delphi.explainers.DefaultExplainer(client)
        record.explanation = (await explain(record)).explanation
        if record.explanation in ("", _UNREADABLE):
            return []
        verdicts = []
        for scorer in (delphi.scorers.DetectionScorer, delphi.scorers.FuzzingScorer):
            score = scorer(client, n_examples_shown=settings.passages_per_prompt)
            verdicts.append((await score(record)).score)
            # delphi counts an error of the judge as an answer that cannot be read.
            if client.error is not None:
                raise client.error
        return verdicts

    async def interpret_all() -> list[list[list[Any]]]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(concurrency))
        free = asyncio.Semaphore(concurrency)
        with tqdm(total=len(records), desc="Latents", disable=not verbose) as bar:

            async def in_turn(record: Any) -> list[list[Any]]:
                async with free:
                    verdicts = await interpret(record)
                    bar.update()
                    return verdicts

            return await asyncio.gather(*(in_turn(record) for record in records))

    # In a thread of its own, because notebooks have an event loop running already.
    with ThreadPoolExecutor(1) as executor:
        try:
            return executor.submit(asyncio.run, interpret_all()).result()
        except BaseException:
            # An interrupt reaches this thread only.
            stopped.set()
            raise


class _Client:
    """Judge with the interface of delphi's clients."""

    def __init__(self, judge: Judge, delphi: ModuleType, stopped: Event) -> None:
        self.judge = judge
        self.response = delphi.clients.client.Response
        self.stopped = stopped
        self.error: Exception | None = None

    async def generate(self, prompt: list[dict[str, str]], **_: Any) -> Any:
        # delphi also passes the temperature, which is the judge's own affair.
        if self.stopped.is_set():
            raise asyncio.CancelledError
        try:
            return self.response(await asyncio.to_thread(self._ask, prompt))
        except Exception as error:
            self.error = error
            raise

    def _ask(self, prompt: list[dict[str, str]]) -> str:
        try:
            reply: Any = self.judge(prompt)
        except StopIteration as error:
            # asyncio would drop it, and wait for a reply for ever.
            raise RuntimeError("the judge raised StopIteration") from error
        # A request that the endpoint refused is an empty reply.
        reply = "" if reply is None else reply
        if not isinstance(reply, str):
            raise ValueError(f"judge must return text, got {type(reply).__name__}")
        return reply


def _scores(verdicts: list[Any], n_quantiles: int) -> QuantileScores:
    # Right, answered, asked.
    counts = np.zeros((3, n_quantiles + 1), dtype=int)
    for verdict in verdicts:
        # delphi counts the parts from 0, the strongest.
        i = n_quantiles - verdict.distance if verdict.activating else 0
        answered = verdict.prediction is not None
        right = answered and verdict.prediction == verdict.activating
        counts[:, i] += (right, answered, True)
    return _quantile_scores(counts)


def _pooled(scores: list[QuantileScores], n_quantiles: int) -> QuantileScores:
    counts = np.zeros((3, n_quantiles + 1), dtype=int)
    for one in scores:
        counts += (one.correct, one.answered, one.asked)
    return _quantile_scores(counts)


def _quantile_scores(counts: NDArray[np.int64]) -> QuantileScores:
    correct, answered, asked = counts.tolist()
    return QuantileScores(
        quantiles=["not", *range(1, counts.shape[1])],
        accuracy=[c / a if a else None for c, a in zip(correct, answered, strict=True)],
        correct=correct,
        answered=answered,
        asked=asked,
    )


@contextmanager
def _global_generators_kept() -> Iterator[None]:
    """Restore the global generators, which delphi seeds and its import draws from."""
    state = random.getstate()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(state)

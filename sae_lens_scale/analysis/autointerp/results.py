"""Settings and results of automated interpretability."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AutointerpSettings:
    """
    How passages are cut, chosen and shown to the judge.

    Attributes:
        passage_length: Tokens per passage. Rows of the corpus are cut into passages;
            what is left over at their ends is dropped.
        n_quantiles: Into how many parts the passages that fire a latent are divided by
            how strongly they do.
        passages_per_quantile: How many of each part are judged.
        non_activating: How many passages that do not fire the latent are judged. They
            are drawn with replacement.
        explained_passages: How many passages the explanation is made from. None of them
            is judged.
        explained_from: How those are chosen: the strongest (MaxAct), as the paper does;
            or as delphi's setting ``train_type`` of that name does.
        min_passages: A latent that fires in fewer passages is left out.
        passages_per_prompt: How many passages the judge sees at a time.
        seed: Which passages are drawn.

    Raises:
        ValueError: If a number is too small; if the passages to be judged do not divide
            into prompts; if ``min_passages`` leaves too few to explain or to judge.
    """

    passage_length: int = 32
    n_quantiles: int = 10
    passages_per_quantile: int = 5
    non_activating: int = 50
    explained_passages: int = 40
    explained_from: Literal["top", "random", "quantiles", "mix"] = "top"
    min_passages: int = 200
    passages_per_prompt: int = 5
    seed: int = 22

    def __post_init__(self) -> None:
        for name, least in (
            ("passage_length", 2),
            ("n_quantiles", 1),
            ("passages_per_quantile", 1),
            ("non_activating", 2),
            ("explained_passages", 1),
            ("passages_per_prompt", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} must be at least {least}, got {getattr(self, name)}"
                )
        if self.explained_from not in ("top", "random", "quantiles", "mix"):
            raise ValueError(
                'explained_from must be "top", "random", "quantiles" or "mix", got '
                f"{self.explained_from!r}"
            )
        judged = self.n_quantiles * self.passages_per_quantile
        # delphi takes an answer of any other length for none.
        if (judged + self.non_activating) % self.passages_per_prompt:
            raise ValueError(
                "passages_per_prompt must divide n_quantiles * passages_per_quantile + "
                f"non_activating = {judged + self.non_activating}, got "
                f"{self.passages_per_prompt}"
            )
        # Half of a latent's passages are for its explanation, half for judging it.
        least = 2 * max(judged, self.explained_passages)
        if self.min_passages < least:
            raise ValueError(
                f"min_passages must be at least {least}, twice as many as are explained "
                f"or judged, got {self.min_passages}"
            )


@dataclass(frozen=True)
class QuantileScores:
    """
    A judge's accuracy by how strongly passages fire a latent, as in figure 3d.

    Attributes:
        quantiles: ``"not"`` for passages that do not fire the latent, then 1 for the
            weakest part of those that do, up to ``n_quantiles`` for the strongest.
        accuracy: Share of right answers among the answers for each; ``None`` without
            any.
        correct: How many answers were right for each.
        answered: How many answers there were for each.
        asked: How many there should have been. The others could not be read.
    """

    quantiles: list[str | int]
    accuracy: list[float | None]
    correct: list[int]
    answered: list[int]
    asked: list[int]


@dataclass(frozen=True)
class LatentInterpretation:
    """
    What the judge made of a latent.

    Attributes:
        latent: Its index in ``range(d_sae)``.
        explanation: What the judge thinks that it stands for.
        detection: How well the explanation tells passages that fire the latent from
            others.
        fuzzing: How well it tells passages whose marked tokens fire the latent from
            others, where any are marked.
    """

    latent: int
    explanation: str
    detection: QuantileScores
    fuzzing: QuantileScores


@dataclass(frozen=True)
class SkippedLatent:
    """
    A latent without scores.

    Attributes:
        latent: Its index in ``range(d_sae)``.
        reason: Why.
    """

    latent: int
    reason: str


@dataclass(frozen=True)
class Interpretability:
    """
    Automated interpretability of some latents.

    Attributes:
        detection: Over all answers about all of ``latents``.
        fuzzing: The same for fuzzing.
        latents: Those that were explained and judged, in the order asked for.
        skipped: Those that were not.
        passages: How many passages the corpus was cut into.
        settings: How passages were cut, chosen and shown.
    """

    detection: QuantileScores
    fuzzing: QuantileScores
    latents: list[LatentInterpretation]
    skipped: list[SkippedLatent]
    passages: int
    settings: AutointerpSettings

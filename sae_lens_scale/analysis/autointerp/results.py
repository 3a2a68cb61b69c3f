"""Results of automated interpretability."""

from dataclasses import dataclass

from .settings import AutointerpSettings


@dataclass(frozen=True)
class QuantileScores:
    """
    A judge's accuracy by the strength of activation, as in figure 3d.

    Attributes:
        quantiles: ``"not"`` for passages that do not fire the latent, then 1 for the
            weakest part of those that do, up to ``n_quantiles`` for the strongest.
        accuracy: Share of right answers among the answers for each; ``None`` without
            any.
        correct: Number of right answers for each.
        answered: Number of answers for each.
        asked: Number of answers that were asked for. The others could not be read.
    """

    quantiles: list[str | int]
    accuracy: list[float | None]
    correct: list[int]
    answered: list[int]
    asked: list[int]


@dataclass(frozen=True)
class LatentInterpretation:
    """
    A judge's explanation of a latent, with its scores.

    Attributes:
        latent: Its index in ``range(d_sae)``.
        explanation: The judge's explanation of its meaning.
        detection: Scores of telling passages that fire the latent from others by the
            explanation.
        fuzzing: Scores of telling passages whose marked tokens fire the latent from
            passages whose marked tokens do not.
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
        reason: The reason why it has none.
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
        passages: Number of passages that the corpus was cut into.
        settings: Settings of the measurement.
    """

    detection: QuantileScores
    fuzzing: QuantileScores
    latents: list[LatentInterpretation]
    skipped: list[SkippedLatent]
    passages: int
    settings: AutointerpSettings

"""Settings of automated interpretability."""

from dataclasses import dataclass
from typing import Literal

from sae_lens_scale.analysis.corpus import require_integer


@dataclass(frozen=True)
class AutointerpSettings:
    """
    Cutting, choice and number of the passages that the judge sees.

    Attributes:
        passage_length: Tokens per passage. Rows of the corpus are cut into passages;
            the rest at their ends is dropped.
        n_quantiles: Number of parts into which the passages that fire a latent are
            divided by the strength of their activation.
        passages_per_quantile: Number of passages of each part that are judged.
        non_activating: Number of judged passages that do not fire the latent. They are
            drawn with replacement.
        explained_passages: Number of passages that the explanation is made from. None of
            them is judged.
        explained_from: Choice of those: "top" for the strongest (MaxAct), as in the paper;
            others as delphi's setting ``train_type`` of that name.
        min_passages: A latent that fires in fewer passages is left out.
        passages_per_prompt: Number of passages that the judge sees at a time.
        seed: Seed of the choice of passages.

    Raises:
        ValueError: If a number is no integer or too small; if the passages to be judged do
            not divide into prompts; if ``min_passages`` leaves too few to explain or to
            judge.
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
            ("min_passages", 1),
            ("passages_per_prompt", 1),
            ("seed", 0),
        ):
            # Of Python's type, as random generators and JSON take no other.
            value = require_integer(name, getattr(self, name), least)
            object.__setattr__(self, name, value)
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

"""
Automated interpretability (Appendix A.3, figure 3d of the Scale SAE paper), by delphi.

EleutherAI's delphi builds the prompts, reads the judge's answers and decides which are right.
This package hands SAELens's SAEs to it and counts its verdicts.

delphi's requirements include vllm: gigabytes of CUDA packages that are not used here and,
beside a torch without CUDA, break transformers. So it is installed in two steps, the first
with the requirements that are needed::

    pip install '.[autointerp]'   # in a checkout of sae-lens-scale
    pip install --no-deps eai-delphi==0.1.3
"""

from .judges import Judge, local_judge, openai_judge
from .pipeline import autointerp
from .results import (
    Interpretability,
    LatentInterpretation,
    QuantileScores,
    SkippedLatent,
)
from .settings import AutointerpSettings

__all__ = [
    "AutointerpSettings",
    "Interpretability",
    "Judge",
    "LatentInterpretation",
    "QuantileScores",
    "SkippedLatent",
    "autointerp",
    "local_judge",
    "openai_judge",
]

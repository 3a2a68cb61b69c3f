"""Mean and spread of scores over SAEs that differ only in the seed of their training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from sae_lens import SAE
from sae_lens.constants import RUNNER_CFG_FILENAME

from sae_lens_scale.files import read_json

# Of an SAE's metadata: results of its training.
_MEASURED = ("omega", "l0", "num_dead_features")
# Of a runner's config: what differs between two seeds of one run.
_OF_ONE_RUN = ("seed", "output_path", "checkpoint_path", "logger")


@dataclass(frozen=True)
class Spread:
    """
    Mean of a score over SAEs.

    Attributes:
        mean: The mean; None if an SAE lacks the score.
        std: Standard deviation over SAEs (with n - 1); None for a single one.
    """

    mean: float | None
    std: float | None


def spread(scores: Sequence[float | None]) -> Spread:
    """Compute mean and standard deviation of one score, of one SAE after the other."""
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return Spread(None, None)
    return Spread(fmean(known), stdev(known) if len(known) > 1 else None)


def settings_but_seed(sae: SAE[Any], folder: Path | None) -> dict[str, Any]:
    """
    Collect the settings of an SAE and of its training, the seed left out.

    Args:
        sae: The SAE.
        folder: Its folder, where SAELens's runner may have left its config.

    Raises:
        ValueError: If that config is not JSON.
    """
    cfg = sae.cfg.to_dict()
    cfg["metadata"] = {
        name: value for name, value in cfg["metadata"].items() if name not in _MEASURED
    }
    run = None if folder is None else folder / RUNNER_CFG_FILENAME
    runner = {} if run is None or not run.exists() else read_json(run)
    kept = {name: value for name, value in runner.items() if name not in _OF_ONE_RUN}
    return {"sae": cfg, "runner": kept}

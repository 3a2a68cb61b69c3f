"""Mean and spread of scores, and which SAEs differ only in the seed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae_lens_scale.analysis.scores.spread import Spread, settings_but_seed, spread


@pytest.mark.parametrize(
    ("scores", "mean", "std"),
    [([2.0], 2, None), ([1.0, 3.0], 2, 2**0.5), ([1.0, None], None, None)],
)
def test_spread_is_the_standard_deviation_where_there_is_one(
    scores: list[float | None], mean: float | None, std: float | None
):
    assert spread(scores) == Spread(mean, std)


def test_settings_are_the_same_for_two_seeds_and_for_no_others(
    make_sae: Callable[..., Any], tmp_path: Path
):
    def settings(run: dict[str, Any], l0: float, **overrides: Any) -> dict[str, Any]:
        sae = make_sae("topk", **overrides)
        sae.cfg.metadata.l0 = l0
        (tmp_path / "runner_cfg.json").write_text(json.dumps(run))
        return settings_but_seed(sae, tmp_path)

    one = settings({"seed": 0, "lr": 1e-3, "output_path": "a"}, 6.0)
    assert one == settings({"seed": 1, "lr": 1e-3, "output_path": "b"}, 5.9)
    assert one != settings({"seed": 1, "lr": 2e-3, "output_path": "b"}, 6.0)
    assert one != settings({"seed": 0, "lr": 1e-3, "output_path": "a"}, 6.0, k=7)
    assert settings_but_seed(make_sae("topk"), None)["runner"] == {}

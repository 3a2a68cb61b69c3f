"""The picture of token explanations."""

from pathlib import Path

import pytest
from matplotlib.patches import Rectangle

from sae_lens_scale.analysis.plots import plot_token_explanations
from sae_lens_scale.analysis.tokens import ActiveLatent, TokenExplanation


def test_plot_token_explanations_draws_every_latent(tmp_path: Path):
    explanations = [
        TokenExplanation(
            " love",
            1,
            [3, 0],
            [0.6, 0.4],
            [ActiveLatent(450, 3, 2.5), ActiveLatent(7, 0, 1.5)],
        ),
        TokenExplanation(" apples", 2, [1, 3], [0.9, 0.1], [ActiveLatent(150, 1, 1.0)]),
    ]
    figure = plot_token_explanations(explanations, "title")
    (axes,) = figure.axes
    bars = [bar for bar in axes.patches if isinstance(bar, Rectangle)]
    lengths = sorted(bar.get_width() for bar in bars)
    want = sorted(a.activation for e in explanations for a in e.latents)
    assert lengths == pytest.approx(want)
    figure.savefig(tmp_path / "tokens.png")
    assert (tmp_path / "tokens.png").stat().st_size > 10_000


def test_plot_token_explanations_refuses_nothing_to_draw():
    with pytest.raises(ValueError, match="explanations must not be empty"):
        plot_token_explanations([], "title")

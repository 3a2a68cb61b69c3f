"""The picture of token explanations."""

import re
from pathlib import Path

import pytest
from matplotlib.patches import Rectangle

from sae_lens_scale.analysis.plots import plot_token_explanations
from sae_lens_scale.analysis.tokens import ActiveLatent, TokenExplanation


def test_plot_token_explanations_draws_every_latent(tmp_path: Path):
    love = [ActiveLatent(450, 3, 2.5), ActiveLatent(7, 0, 1.5), ActiveLatent(8, 0, 1)]
    apples = [ActiveLatent(451, 3, 1.0)]
    explanations = [
        TokenExplanation(" love", 1, [0, 3], [0.6, 0.4], love),
        TokenExplanation(" apples", 2, [1, 3], [0.9, 0.1], apples),
    ]
    figure = plot_token_explanations(iter(explanations), "title")
    (axes,) = figure.axes
    bars = [bar for bar in axes.patches if isinstance(bar, Rectangle)]
    # The bars of the first expert stand first, end to end.
    places = [(bar.get_x(), bar.get_width()) for bar in bars]
    assert places == [(0, 1.5), (1.5, 1), (2.5, 2.5), (0, 1)]
    assert [text.get_text() for text in axes.texts] == ["7", "8", "450", "451"]
    zero, same, three, elsewhere = (bar.get_facecolor() for bar in bars)
    assert zero == same != three == elsewhere
    figure.savefig(tmp_path / "tokens.png")
    assert (tmp_path / "tokens.png").stat().st_size > 10_000


def test_negative_latents_and_those_of_experts_that_were_not_selected_have_bars_too():
    latents = [ActiveLatent(8, 0, -3.0), ActiveLatent(450, 3, 2.0)]
    latents += [ActiveLatent(9, 0, -1.0), ActiveLatent(300, 2, 0.5)]
    explanations = [TokenExplanation(" love", 1, [3, 0], [0.6, 0.4], latents)]
    (axes,) = plot_token_explanations(explanations, "title").axes
    bars = [bar for bar in axes.patches if isinstance(bar, Rectangle)]
    # The selected experts by rank, then the other; from zero to either side.
    assert [text.get_text() for text in axes.texts] == ["450", "8", "9", "300"]
    places = [(bar.get_x(), bar.get_width()) for bar in bars]
    assert places == [(0, 2), (0, -3), (-3, -1), (2, 0.5)]


def test_latents_are_named_as_far_as_there_is_room_in_a_colour_that_can_be_read():
    latents = [ActiveLatent(i, i, width) for i, width in ((0, 20), (1, 20), (2, 1))]
    explanations = [TokenExplanation(" love", 1, [0, 1, 2], [0.4, 0.3, 0.3], latents)]
    names = {0: " $a\n$", 1: "w" * 100, 2: "apple"}
    (axes,) = plot_token_explanations(explanations, "title", names).axes
    first, second, third = axes.texts
    assert first.get_text() == "0\n$a\\n$"
    assert re.fullmatch(r"1\nw{20,70}…", second.get_text())
    assert third.get_text() == "2"
    assert not any(text.get_parse_math() for text in axes.texts)
    # Of the colours of the first two experts, dark and light blue.
    assert (first.get_color(), second.get_color()) == ("white", "black")
    figure = plot_token_explanations(explanations, "title", names)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    bars = [bar.get_window_extent() for bar in axes.patches]
    for text, bar in zip(axes.texts, bars, strict=True):
        extent = text.get_window_extent()
        assert bar.x0 <= extent.x0
        assert extent.x1 <= bar.x1


def test_a_dollar_sign_begins_no_formula(tmp_path: Path):
    latents = [ActiveLatent(8, 0, 1.0)]
    tokens = ["$$", " $\\frac$", "$x$"]
    explanations = [TokenExplanation(token, 1, [0], [1.0], latents) for token in tokens]
    figure = plot_token_explanations(explanations, "so $$ and $\\frac$")
    figure.savefig(tmp_path / "tokens.png", dpi=30)
    (axes,) = figure.axes
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == ["$$", " $\\\\frac$", "$x$"]
    assert not any(label.get_parse_math() for label in axes.get_yticklabels())


def test_plot_token_explanations_refuses_nothing_to_draw():
    with pytest.raises(ValueError, match="explanations must not be empty"):
        plot_token_explanations([], "title")

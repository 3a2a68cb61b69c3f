"""Picture of the latents and experts that each token activates."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from sae_lens_scale.analysis.tokens import TokenExplanation
from sae_lens_scale.extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Inches that the bars of the longest row take, and that a character of their labels takes.
_ROW_WIDTH = 7.5
_CHARACTER_WIDTH = 0.08


def plot_token_explanations(
    explanations: Iterable[TokenExplanation],
    title: str,
    names: Mapping[int, str] = MappingProxyType({}),
) -> "Figure":
    """
    Draw each token's strongest latents, grouped by expert (after figure 9 of the paper).

    A row per token. A bar is a latent, as long as its feature activation, to the left of
    zero if that is negative; bars of one expert stand together in one colour, which is the
    expert's in the whole picture, and those of experts that the token selected come first.

    Args:
        explanations: Results of :func:`~sae_lens_scale.analysis.tokens.explain_tokens`.
        title: Title of the picture.
        names: Text for some latents, such as the token that fires each most; it stands below
            the latent's index, as much of it as the bar has room for.

    Returns:
        The figure; save it with ``savefig``. As pixels it holds about 700 tokens at 150 dpi,
        in a vector format such as SVG any number.

    Raises:
        ImportError: If the package ``matplotlib`` is not installed.
        ValueError: If there is nothing to draw.
    """
    require("matplotlib", "plots")
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    explanations = list(explanations)
    if not explanations:
        raise ValueError("explanations must not be empty")
    # A figure of its own, not pyplot's: it leaves the caller's backend alone.
    figure = Figure(figsize=(10, 1.2 + 0.62 * len(explanations)), layout="constrained")
    axes = figure.subplots()
    experts = sorted({a.expert for e in explanations for a in e.latents})
    # Colours that are easy to tell apart, while there are enough of them.
    few = len(experts) <= 20
    colormap = colormaps["tab20" if few else "gist_rainbow"]
    colors = {
        e: colormap(i if few else i / len(experts)) for i, e in enumerate(experts)
    }
    longest = max(
        max(sum(abs(a.activation) for a in e.latents) for e in explanations), 1e-9
    )
    for row, explanation in enumerate(explanations):
        # A latent that a hook has turned up may be of another expert than those selected.
        ranks = {expert: rank for rank, expert in enumerate(explanation.experts)}
        by_expert = sorted(
            explanation.latents,
            key=lambda a: (
                ranks.get(a.expert, len(ranks)),
                a.expert,
                -abs(a.activation),
            ),
        )
        # Ends of the bars on either side of zero.
        ends = {False: 0.0, True: 0.0}
        for active in by_expert:
            negative = active.activation < 0
            bar = axes.barh(
                row,
                active.activation,
                left=ends[negative],
                height=0.7,
                color=colors[active.expert],
                edgecolor="white",
            )
            room = int(abs(active.activation) / longest * _ROW_WIDTH / _CHARACTER_WIDTH)
            axes.bar_label(
                bar,
                [_label(active.latent, names.get(active.latent, ""), room)],
                label_type="center",
                fontsize=7,
                color=_text_color(colors[active.expert]),
                parse_math=False,
            )
            ends[negative] += active.activation
    # Text is shown as it is: a dollar sign does not begin a formula.
    axes.set_yticks(
        range(len(explanations)),
        [repr(e.token)[1:-1] for e in explanations],
        parse_math=False,
    )
    axes.invert_yaxis()
    axes.set_xlabel(
        "feature activation (one bar per latent, with its index; colours are experts)"
    )
    axes.set_title(title, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    if len(colors) <= 24:
        handles = [
            Line2D([], [], color=color, linewidth=6, label=f"expert {expert}")
            for expert, color in colors.items()
        ]
        figure.legend(handles=handles, fontsize=7, loc="outside right upper")
    return figure


def _label(latent: int, name: str, room: int) -> str:
    """Index of a latent, and below it as much of its name as there is room for."""
    name = repr(name.strip())[1:-1]
    if len(name) > room:
        name = f"{name[: max(0, room - 1)]}…" if room > 2 else ""
    return f"{latent}\n{name}" if name else str(latent)


def _text_color(color: tuple[float, float, float, float]) -> str:
    """Black on light bars, white on dark ones."""
    red, green, blue, _ = color
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"

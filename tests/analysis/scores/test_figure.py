"""The picture of scores."""

import pytest

from sae_lens_scale.analysis.scores import Spread, plot_scores


def test_each_score_has_a_panel_and_each_sae_a_row():
    scores = [
        {"fvu": Spread(0.1, 0.01), "redundancy": Spread(None, None)},
        {"fvu": Spread(0.3, None), "redundancy": Spread(0.2, None)},
    ]
    figure = plot_scores(["scale$", "topk_"], scores)
    fvu, redundancy = figure.axes
    assert fvu.get_title() == "fvu\nlower is better"
    assert [label.get_text() for label in fvu.get_yticklabels()] == ["scale$", "topk_"]
    points = [tuple(map(float, bar[0].get_xydata()[0])) for bar in fvu.containers]
    assert points == [(0.1, 0), (0.3, 1)]
    ends = fvu.containers[0][2][0].get_segments()[0]
    assert ends[:, 0] == pytest.approx([0.09, 0.11])
    assert len(redundancy.containers) == 1


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        plot_scores([], [])

"""Packages that are not installed: the error says what to type."""

import sys

import pytest

from sae_lens_scale.analysis.autointerp import openai_judge
from sae_lens_scale.analysis.plots import plot_token_explanations
from sae_lens_scale.analysis.scores import shortest_datasets


def test_plots_without_matplotlib_name_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[plots\]'"):
        plot_token_explanations([], "title")


def test_a_judge_without_openai_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[autointerp\]'"):
        openai_judge("model")


def test_probing_without_sae_probes_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sae_probes", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[score\]'"):
        shortest_datasets(1)

"""Selections: the registered ones, and another one put in their place."""

import pytest
import torch

from sae_lens_scale.saes.mixture.selection import SELECTIONS, TopKOver, topk


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 5, 12, 100])
@pytest.mark.parametrize("topk_over", list(SELECTIONS))
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_selections_keep_the_largest_candidates_of_all_experts_together(
    k: int, topk_over: TopKOver, tokens: int
):
    pre, gates = draw(tokens, 2, 6), draw(tokens, 2, seed=1).abs()
    selection = SELECTIONS[topk_over]
    ranking = selection.rank(pre, gates).flatten(1)
    want = (pre if topk_over == "activations" else pre * gates[..., None]).flatten(1)
    want = want.argsort(descending=True)
    selected = selection.select(ranking, (k,))
    assert (selected.widths, selected.mask) == ((min(k, 12),), None)
    found = selected.positions.sort().values
    assert torch.equal(found, want[:, : min(k, 12)].sort().values)
    both = selection.select(ranking, (k, 4 * k))
    assert both.widths == (min(k, 12), min(4 * k, 12) - min(k, 12))
    assert torch.equal(both.positions, want[:, : min(4 * k, 12)])


def test_topk_of_equal_candidates_selects_no_candidate_twice():
    positions = topk(torch.ones(3, 8), (5,)).positions
    assert all(len(set(row)) == 5 for row in positions.tolist())

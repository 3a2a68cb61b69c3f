"""Compact activations in their dense and sparse forms."""

import pytest
import torch
from helpers import draw

from sae_lens_scale.ops import SparseLatents


@pytest.mark.parametrize("batch", [(), (1,), (9,), (2, 5), (2, 3, 2)])
def test_SparseLatents_dense_and_sparse_forms_agree(batch: tuple[int, ...]):
    values = draw(*batch, 3)
    indices = torch.rand(*batch, 24).topk(3, dim=-1).indices
    latents = SparseLatents(values, indices)
    dense = latents.to_dense(24)
    assert dense.shape == (*batch, 24)
    torch.testing.assert_close(dense.gather(-1, indices), values)
    assert dense.count_nonzero() == values.numel()
    assert torch.equal(latents.to_coo(24).to_dense(), dense)

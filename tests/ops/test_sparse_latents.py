"""Compact activations in their dense and sparse forms."""

import pytest
import torch

from sae_lens_scale.ops import SparseLatents

D_SAE = 24


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("batch", [(), (1,), (9,), (2, 5), (2, 3, 2)])
def test_SparseLatents_dense_and_sparse_forms_agree(batch: tuple[int, ...]):
    values = draw(*batch, 3)
    indices = torch.rand(*batch, D_SAE).topk(3, dim=-1).indices
    latents = SparseLatents(values, indices)
    dense = latents.to_dense(D_SAE)
    assert dense.shape == (*batch, D_SAE)
    torch.testing.assert_close(dense.gather(-1, indices), values)
    assert dense.count_nonzero() == values.numel()
    assert torch.equal(latents.to_coo(D_SAE).to_dense(), dense)

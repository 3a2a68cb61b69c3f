"""Memory that is reused, but never while somebody uses it."""

import copy
import pickle

import pytest
import torch

from sae_lens_scale.ops import BufferPool
from sae_lens_scale.ops.buffers import zeros

LIKE = torch.zeros(1)


def test_memory_is_reused_once_nobody_uses_it():
    pool = BufferPool()
    first = pool.take((3, 4), LIKE)
    address = first.data_ptr()
    del first
    assert pool.take((2, 6), LIKE).data_ptr() == address


@pytest.mark.parametrize(
    "keep", [lambda t: t, lambda t: t[1:].T, lambda t: t.detach(), lambda t: t.numpy()]
)
def test_memory_that_anything_uses_is_not_given_out_again(keep):
    pool = BufferPool()
    user = keep(pool.take((3, 4), LIKE))
    others = [pool.take((3, 4), LIKE) for _ in range(3)]
    user[...] = 1
    for other in others:
        other.fill_(2)
    assert (user == 1).all()
    assert len({other.data_ptr() for other in others}) == 3


def test_a_pool_keeps_few_buffers():
    pool = BufferPool()
    held = [pool.take((n, 4), LIKE) for n in range(1, 20)]
    del held
    assert len(pool._buffers) == 4


def test_memory_outlives_its_pool():
    pool = BufferPool()
    tensor = pool.take((1000, 1000), LIKE).fill_(3)
    del pool
    torch.full((1000, 1000), 4.0)
    assert (tensor == 3).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), ()])
def test_tensors_have_the_shape_and_dtype_asked_for(
    shape: tuple[int, ...], dtype: torch.dtype
):
    like = torch.zeros(1, dtype=dtype)
    for tensor in (BufferPool().take(shape, like), zeros(shape, like)):
        assert tensor.shape == shape and tensor.dtype == dtype
    assert (zeros(shape, like) == 0).all()


def test_a_copied_pool_shares_nothing():
    pool = BufferPool()
    address = pool.take((3, 4), LIKE).data_ptr()
    for other in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        kept = other.take((3, 4), LIKE)
        assert kept.data_ptr() != address

"""Reading of cached activations."""

from itertools import islice

import pytest
import torch

from reproduction.activations import Activations


def parts(*lengths: int) -> list[torch.Tensor]:
    """Numbered tokens."""
    numbers = torch.arange(sum(lengths)).float()
    return list(torch.stack([numbers, -numbers], dim=-1).split(lengths))


@pytest.mark.parametrize("lengths", [(10,), (3, 7), (1, 1, 8), (9, 1)])
def test_tokens_are_read_across_shards(lengths: tuple[int, ...]):
    activations = Activations(parts(*lengths))
    indices = torch.tensor([9, 0, 3, 3, 8, 1, 2])
    want = torch.stack([indices, -indices], dim=-1).float()
    assert torch.equal(activations.take(indices), want)
    assert torch.equal(activations.to("cpu").take(indices), want)
    fewer = Activations(parts(*lengths), tokens=8).to("cpu")
    assert torch.equal(torch.cat(list(fewer.batches(5))), torch.cat(parts(10))[:8])
    # There may be no room for it twice.
    assert fewer.to("cpu")._parts[0].data_ptr() == fewer._parts[0].data_ptr()
    assert [len(batch) for batch in activations.batches(4)] == [4, 4, 2]
    assert torch.equal(torch.cat(list(activations.batches(3))), torch.cat(parts(10)))


def test_each_epoch_is_a_new_order_of_all_tokens_that_the_seed_decides():
    activations = Activations(parts(7, 6), tokens=12)

    def epochs(seed: int) -> list[list[float]]:
        batches = islice(activations.shuffled(4, seed), 6)
        numbers = torch.cat(list(batches))[:, 0].tolist()
        return [numbers[:12], numbers[12:]]

    first, second = epochs(0)
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert [first, second] == epochs(0)
    assert first != epochs(1)[0]
    sample = activations.sample(5)
    assert torch.equal(sample, activations.sample(5))
    assert len(activations.sample(99)) == 12
    # Tokens that do not fill a batch wait for another epoch.
    ten = islice(activations.shuffled(5, 0), 2)
    assert len(torch.cat(list(ten))[:, 0].unique()) == 10


def test_activations_need_tokens():
    with pytest.raises(ValueError, match="parts must hold 1 tokens, got 0"):
        Activations([])
    with pytest.raises(ValueError, match="parts must hold 11 tokens, got 10"):
        Activations(parts(10), tokens=11)
    with pytest.raises(ValueError, match="batch_size must be at most the 10 tokens"):
        next(Activations(parts(10)).shuffled(11, 0))

"""The order in which cached activations are read, and reading ahead."""

from collections.abc import Iterator
from itertools import islice
from threading import Event

import pytest
import torch

from sae_lens_scale.cache.reading import Activations, read_ahead

BLOCK = 16
# 157 blocks, the last of 4 tokens, in shards that part them anywhere.
LENGTHS = (1, 700, 299, 1_000, 500)
TOKENS = sum(LENGTHS)


def numbered(*lengths: int) -> Activations:
    """Tokens that are their own numbers."""
    numbers = torch.arange(sum(lengths)).float().view(-1, 1)
    return Activations(list(numbers.split(lengths)))


def take(windows: Iterator[torch.Tensor], tokens: int) -> torch.Tensor:
    """The numbers of the first tokens."""
    got = torch.empty(0)
    while len(got) < tokens:
        got = torch.cat([got, next(windows).flatten()])
    return got[:tokens]


@pytest.mark.parametrize("window", [1, 4 * BLOCK, 5 * BLOCK + 7, 10**6])
def test_each_epoch_reads_every_token_once_in_an_order_of_its_own(window: int):
    activations = numbered(*LENGTHS)

    def read(seed: int) -> torch.Tensor:
        return take(activations.windows(window, seed), 2 * TOKENS)

    first, second = read(0).split(TOKENS)
    everything = torch.arange(TOKENS).float()
    assert torch.equal(first.sort().values, everything)
    assert torch.equal(second.sort().values, everything)
    assert not torch.equal(first, second)
    assert torch.equal(torch.cat([first, second]), read(0))
    assert not torch.equal(read(1), read(0))
    # Shards are of no concern.
    whole = numbered(TOKENS)
    assert torch.equal(take(whole.windows(window, 0), 2 * TOKENS), read(0))


@pytest.mark.parametrize("start", [1, 511, 512, TOKENS - 1, TOKENS, 2 * TOKENS + 700])
def test_reading_begins_anywhere_as_if_it_had_read_that_far(start: int):
    activations = numbered(*LENGTHS)
    want = take(activations.windows(4 * BLOCK, 3), start + 2_000)[start:]
    assert torch.equal(take(activations.windows(4 * BLOCK, 3, start), 2_000), want)


def test_a_window_mixes_tokens_from_everywhere():
    activations = numbered(400 * BLOCK)
    first, second = islice(activations.windows(40 * BLOCK, 0), 2)
    for window in (first, second):
        blocks = (window.flatten() / BLOCK).long()
        # 40 of the 400 blocks, over all of the text, and each batch has rows of most of them.
        assert len(blocks.unique()) == 40
        assert blocks.float().std() > 0.8 * torch.arange(400).float().std()
        assert all(len(batch.unique()) > 30 for batch in blocks.split(320))
    # Neighbours are a 40th of the window's pairs.
    blocks = (first.flatten() / BLOCK).long()
    assert (blocks[1:] == blocks[:-1]).float().mean() < 2 / 40


def test_windows_keep_the_type_in_which_tokens_are_stored():
    activations = Activations([torch.randn(300, 4).bfloat16()])
    assert next(activations.windows(128, 0)).dtype == torch.bfloat16


def test_one_item_is_read_ahead_and_errors_arrive_in_their_place():
    read: list[int] = []
    third = Event()

    def source() -> Iterator[int]:
        for i in range(1, 4):
            read.append(i)
            if i == 3:
                third.set()
            yield i
        raise OSError("the disk is gone")

    assert list(read_ahead(iter(range(5)))) == list(range(5))
    items = read_ahead(source())
    assert not read
    assert [next(items), next(items)] == [1, 2]
    # In the thread, while the second is in use.
    assert third.wait(10)
    assert read == [1, 2, 3]
    assert next(items) == 3
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)

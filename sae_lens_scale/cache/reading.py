"""
Reading of cached activations.

They lie on disk in the order of the text, in shards (:mod:`.writing`), which readers map into
memory and mix anew, over all tokens, for each training run.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, count
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

T = TypeVar("T")

# Neighbouring tokens that are read in one piece, of tens of kB in most models. With 128 a window
# has fewer contexts, and SAEs up to 1.5 % more error (reproduction/LOG.md, "The start inside the
# SAE").
_BLOCK = 16


class Activations:
    """
    Activations of many tokens, on disk or in memory.

    Args:
        parts: Tensors ``[tokens, d_in]``, which may be memory-mapped.
        tokens: Number of tokens to read; all by default.

    Raises:
        ValueError: If there are none, or fewer than ``tokens``.
    """

    def __init__(self, parts: Sequence[torch.Tensor], tokens: int | None = None):
        available = sum(map(len, parts))
        if not available or available < (tokens or 0):
            raise ValueError(f"parts must hold {tokens or 1} tokens, got {available}")
        self._parts = list(parts)
        self._ends = [*accumulate(len(part) for part in parts)]
        self._tokens = available if tokens is None else tokens

    def __len__(self) -> int:
        return self._tokens

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self._parts[0].shape[-1]

    def windows(
        self,
        tokens: int,
        seed: int,
        start: int = 0,
        device: str | torch.device = "cpu",
    ) -> Iterator[torch.Tensor]:
        """
        Read all tokens in an order to train on, epoch after epoch, without an end.

        Each epoch draws blocks of neighbouring tokens from everywhere, without replacement, and
        mixes the tokens of as many blocks as fill a window. The order is a function of the
        seed, of the window and of how many tokens there are, and reading from a position takes
        no longer than from the start.

        Args:
            tokens: Tokens of a window, rounded down to blocks of 16, at least one.
            seed: Seed of the order, at least 0.
            start: Position in the order to begin at, in tokens.
            device: Device of the result.

        Yields:
            ``[tokens, d_in]`` in the type that they are stored in; fewer at ``start`` within a
            window, and at the end of an epoch.
        """
        per_window = max(1, tokens // _BLOCK)
        epoch, skip = divmod(start, len(self))
        for epoch in count(epoch):
            order = np.random.default_rng((seed, epoch, 0)).permutation(
                -(-len(self) // _BLOCK)
            )
            for i, first in enumerate(range(0, len(order), per_window), start=1):
                # Mixed below: on disk forwards.
                starts = np.sort(order[first : first + per_window]) * _BLOCK
                ends = np.minimum(starts + _BLOCK, len(self))
                rows = int((ends - starts).sum())
                if skip >= rows:
                    skip -= rows
                    continue
                mixed = np.random.default_rng((seed, epoch, i)).permutation(rows)[skip:]
                skip = 0
                pieces = [
                    piece
                    for block in zip(starts.tolist(), ends.tolist(), strict=True)
                    for piece in self._pieces(*block)
                ]
                window = torch.empty(
                    rows,
                    self.d_in,
                    dtype=pieces[0].dtype,
                    pin_memory=torch.device(device).type == "cuda",
                )
                torch.cat(pieces, out=window)
                window = window.to(device, non_blocking=True)
                yield window[torch.from_numpy(mixed).to(device)]

    def _pieces(self, start: int, end: int) -> Iterator[torch.Tensor]:
        """Rows from start to end, part by part."""
        i = bisect_right(self._ends, start)
        while start < end:
            part = self._parts[i]
            before = self._ends[i] - len(part)
            piece = part[start - before : end - before]
            yield piece
            start += len(piece)
            i += 1


def read_ahead(source: Iterator[T]) -> Iterator[T]:
    """Read from a source in a thread, one item ahead of whoever uses them."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, source)
        while True:
            try:
                item = coming.result()
            except StopIteration:
                return
            coming = thread.submit(next, source)
            yield item


def map_shard(file: Path) -> dict[str, torch.Tensor]:
    """
    Map ``activations [tokens, d_in]`` and ``token_ids [tokens]`` of a file into memory.

    Raises:
        ValueError: If it is damaged; the text names the file.
    """
    try:
        with safe_open(file, "pt") as shard:
            return {
                name: shard.get_tensor(name) for name in ("activations", "token_ids")
            }
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged, or no shard: {error}; without it, cache again"
        ) from error


def map_shards(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Map all shards of a folder, in the order of the text."""
    return [map_shard(file) for file in sorted(folder.glob("*.safetensors"))]

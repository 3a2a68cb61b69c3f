"""Memory that is reused from one training step to the next."""

import math
import sys
from typing import Any

import numpy as np
import torch

# More than a training step has gradients that are as large as weights: of encoder and
# decoder, of their dead latents, and of runners-up, which autograd adds up one by one.
_MOST_BUFFERS = 4


def _references_when_unused() -> int:
    """Number of references that Python counts to an object in a list, in a loop over it."""
    for buffer in [np.empty(0)]:
        return sys.getrefcount(buffer)
    raise AssertionError


# It depends on the version of Python. Without its global lock, the count is not exact.
_UNUSED = _references_when_unused()
_CAN_COUNT = getattr(sys, "_is_gil_enabled", lambda: True)()


class BufferPool:
    """
    Memory for large CPU tensors that are made and dropped at every step, as gradients are.

    An optimizer that sets gradients to None hands their memory back to the system, and
    the next step pays for every page of it anew: a tenth of the time of a backward pass.
    A buffer is given out again only once no tensor uses its memory any longer, so a
    gradient that somebody keeps stays as it is. A pool keeps a few buffers, as long as it
    lives.
    """

    def __init__(self) -> None:
        self._buffers: list[np.ndarray[Any, Any]] = []

    def take(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """
        An uninitialised tensor.

        Args:
            shape: Its shape.
            like: Its dtype and device; on other devices than the CPU, whose allocators
                keep memory themselves, it is a new tensor.

        Returns:
            A contiguous tensor.
        """
        nbytes = like.element_size() * math.prod(shape)
        if like.device.type != "cpu" or not nbytes or not _CAN_COUNT:
            return like.new_empty(shape)
        for buffer in self._buffers:
            if buffer.nbytes == nbytes and sys.getrefcount(buffer) == _UNUSED:
                break
        else:
            buffer = np.empty(nbytes, np.uint8)
            if len(self._buffers) < _MOST_BUFFERS:
                self._buffers.append(buffer)
        # resize_, not view: autograd lets nobody edit a view in place.
        return torch.frombuffer(buffer, dtype=like.dtype).resize_(shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> "BufferPool":
        return BufferPool()

    def __reduce__(self) -> tuple[type["BufferPool"], tuple[()]]:
        return BufferPool, ()


def zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """
    Zeros that are cheap where few of them will be written.

    torch.zeros writes all of its memory. On the CPU these are pages that the system maps
    when they are first written or read.

    Args:
        shape: The tensor's shape.
        like: Its dtype and device.

    Returns:
        A contiguous tensor.
    """
    nbytes = like.element_size() * math.prod(shape)
    if like.device.type != "cpu" or not nbytes:
        return like.new_zeros(shape)
    return torch.frombuffer(np.zeros(nbytes, np.uint8), dtype=like.dtype).resize_(shape)

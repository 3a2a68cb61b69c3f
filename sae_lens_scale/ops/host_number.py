"""Numbers that the host needs from the device, without waiting longer than it must."""

from typing import Any

import torch


class HostNumber:
    """
    A number on its way from a device to the host.

    A GPU works through a queue, and the host that asks for a number of the queue's end
    leaves it empty. The copy of a HostNumber is queued when it is made; reading it waits
    until the GPU has come so far, while what was queued since goes on. On the CPU it is
    there at once.

    Args:
        number: A tensor of one number, as it is now.
    """

    # A compiler would copy, or wait, elsewhere.
    @torch.compiler.disable()
    def __init__(self, number: torch.Tensor):
        self._arrival: torch.cuda.Event | None = None
        if number.is_cuda:
            # Into pinned memory, or it would wait.
            self._number = number.detach().to("cpu", non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(number.device))
        else:
            self._number = number.detach().clone()

    @torch.compiler.disable()
    def has_arrived(self) -> bool:
        """Say whether reading it would not wait."""
        return self._arrival is None or self._arrival.query()

    @torch.compiler.disable()
    def read(self) -> int | float | bool:
        """Wait for the number, and return it."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._number.item()

    def __reduce__(self) -> tuple[type["HostNumber"], tuple[Any, ...]]:
        return HostNumber, (torch.tensor(self.read()),)

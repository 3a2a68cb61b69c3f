"""Groups of processes, and what they send each other."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

# Longest wait for the first process where it reads or writes files.
_PATIENCE = timedelta(days=1)


class Group:
    """
    Processes that exchange tensors, and what this one sent.

    Args:
        members: The group of torch.distributed; None for all processes.
        waiting: The same processes as a group with patience, for those that wait for the
            first one; None if they wait as long as for anything else.

    Attributes:
        rank: Place of this process in the group.
        size: Number of processes.
        sent: Bytes that this process sent to others, by purpose. An all-reduce counts as the
            2 (n - 1) / n of its bytes that a ring sends.
        calls: Number of collectives, by purpose.
    """

    def __init__(
        self,
        members: dist.ProcessGroup | None = None,
        waiting: dist.ProcessGroup | None = None,
    ):
        self._members, self.waiting = members, waiting
        self.rank = dist.get_rank(members)
        self.size = dist.get_world_size(members)
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def all_reduce(self, tensor: torch.Tensor, purpose: str) -> torch.Tensor:
        """
        Sum a tensor over the processes, in place.

        Args:
            tensor: Of the same shape everywhere.
            purpose: Name that it is counted under.

        Returns:
            The tensor.
        """
        if self.size > 1:
            self._count(purpose, 2 * tensor.nbytes * (self.size - 1) // self.size)
            dist.all_reduce(tensor, group=self._members)
        return tensor

    def all_gather(
        self, tensor: torch.Tensor, purpose: str, sizes: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """
        Gather a tensor of each process.

        Args:
            tensor: Of any length, and the same other dimensions everywhere.
            purpose: Name that it is counted under.
            sizes: Lengths of all processes' tensors; None asks them.

        Returns:
            The tensors, by rank.
        """
        if self.size == 1:
            return [tensor]
        if sizes is None:
            sizes = self.lengths(tensor, purpose)
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        self._count(purpose, padded.nbytes * (self.size - 1))
        dist.all_gather(gathered, padded, group=self._members)
        return [part[:size] for part, size in zip(gathered, sizes, strict=True)]

    def lengths(self, tensor: torch.Tensor, purpose: str) -> list[int]:
        """
        Gather the lengths of all processes' tensors.

        Args:
            tensor: Of any length.
            purpose: Name that it is counted under.

        Returns:
            The lengths, by rank.
        """
        length = torch.tensor([len(tensor)], device=tensor.device)
        return torch.cat(self.all_gather(length, purpose, [1] * self.size)).tolist()

    def all_to_all(
        self,
        rows: torch.Tensor,
        receive: Sequence[int],
        send: Sequence[int],
        purpose: str,
    ) -> torch.Tensor:
        """
        Send each process some rows, and receive some from each.

        Args:
            rows: Rows to send, by receiver, ``[sum(send), ...]``.
            receive: Number of rows from each process.
            send: Number of rows for each.
            purpose: Name that they are counted under.

        Returns:
            Rows received, by sender, ``[sum(receive), ...]``.
        """
        if self.size == 1:
            return rows
        row_bytes = rows.shape[1:].numel() * rows.element_size()
        self._count(purpose, row_bytes * (sum(send) - send[self.rank]))
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(
            received,
            rows.contiguous(),
            list(receive),
            list(send),
            group=self._members,
        )
        return received

    def send_to_first(self, tensor: torch.Tensor, sender: int, purpose: str) -> None:
        """
        Copy a process's tensor to the first one, in place; both call this, and no others need to.

        Args:
            tensor: Of the same shape on both, contiguous, on the CPU.
            sender: Place of the process that sends it, not the first. It waits with patience.
            purpose: Name that it is counted under.
        """
        if self.rank == sender:
            self._count(purpose, tensor.nbytes)
            dist.send(tensor, 0, group=self.waiting)
        elif self.rank == 0:
            dist.recv(tensor, sender, group=self.waiting)

    def broadcast(self, tensor: torch.Tensor, purpose: str) -> torch.Tensor:
        """
        Copy the first process's tensor to all, in place.

        Args:
            tensor: Of the same shape everywhere.
            purpose: Name that it is counted under.

        Returns:
            The tensor.
        """
        if self.size > 1:
            self._count(purpose, tensor.nbytes if self.rank == 0 else 0)
            first = (
                0 if self._members is None else dist.get_global_rank(self._members, 0)
            )
            dist.broadcast(tensor, first, group=self._members)
        return tensor

    def _count(self, purpose: str, num_bytes: int) -> None:
        self.sent[purpose] += num_bytes
        self.calls[purpose] += 1


def require_same(settings: Mapping[str, Any]) -> None:
    """
    Refuse settings that are not the same on all processes, which call this together.

    Args:
        settings: The settings of this process, by name.

    Raises:
        ValueError: On all processes; names the first one that differs.
    """
    texts = {name: repr(value) for name, value in settings.items()}
    everywhere = [texts] * dist.get_world_size()
    dist.all_gather_object(everywhere, texts)
    first = everywhere[0]
    for rank, other in enumerate(everywhere):
        for name in first | other:
            want, got = first.get(name), other.get(name)
            if got != want:
                raise ValueError(
                    f"{name} must be the same on all processes, got {want} on the first and "
                    f"{got} on that of rank {rank}"
                )


def on_first(world: Group, action: Callable[[], T]) -> T | None:
    """
    Do something on the first process, however long it takes; if it fails, all processes do.

    Args:
        world: All processes, which have to call this together.
        action: What to do.

    Returns:
        The result on the first process, None on the others.

    Raises:
        RuntimeError: On the others, if it failed; names the error. The first process raises
            what the action raised.
    """
    result, error = None, None
    if world.rank == 0:
        try:
            result = action()
        except BaseException as raised:
            error = raised
    report = [None if error is None else f"{type(error).__name__}: {error}"]
    if world.size > 1:
        dist.broadcast_object_list(report, group=world.waiting)
    if error is not None:
        raise error
    if report[0] is not None:
        raise RuntimeError(f"the first process failed: {report[0]}")
    return result


@dataclass(frozen=True)
class Mesh:
    """
    Processes that train an SAE.

    Attributes:
        world: All of them, whose tokens are one batch.
        experts: Those that share out the experts among them, one after the other.
        replicas: Those that hold the same experts.
    """

    world: Group
    experts: Group
    replicas: Group


def make_mesh(expert_parallel: int, timeout: timedelta | None = None) -> Mesh:
    """
    Arrange all processes of torch.distributed as replicas × experts.

    Args:
        expert_parallel: Number of neighbouring processes that share out the experts.
        timeout: Longest wait for another process; None for torch's default.

    Raises:
        ValueError: If it does not divide the number of processes.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    is_whole = isinstance(expert_parallel, int) and expert_parallel > 0
    if not is_whole or size % expert_parallel:
        raise ValueError(
            f"expert_parallel must divide the number of processes, {size}, got "
            f"{expert_parallel!r}"
        )
    # Made by all processes, in the same order, also those that they are not in.
    ranks = torch.arange(size).view(-1, expert_parallel)
    groups = []
    for partition in (ranks, ranks.T):
        for members in partition.tolist():
            group = dist.new_group(members, timeout=timeout)
            if rank in members:
                assert isinstance(group, dist.ProcessGroup)
                groups.append(Group(group))
    # By the host: a save may take longer than any message. Who dies is missed at once.
    waiting = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(waiting, dist.ProcessGroup)
    return Mesh(Group(waiting=waiting), *groups)

"""Slices of parameters, each updated by one of the processes that hold the whole parameter."""

import torch
from torch import nn

from .groups import Group


class Slices:
    """
    A share of some parameters for each of their replicas, as ZeRO's first stage has it
    (Rajbhandari et al. 2020).

    An optimizer of the slices keeps a state for this process's share only. Where there are no
    other replicas, slices are the parameters themselves.

    Args:
        parameters: The parameters, contiguous, by name.
        replicas: Processes that hold the same.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], replicas: Group):
        self._parameters, self._replicas = parameters, replicas
        self._slices = dict(parameters)
        if replicas.size > 1:
            for name, parameter in parameters.items():
                # In the parameter's memory.
                own = parameter.data.view(-1).split(self._sizes(name))[replicas.rank]
                self._slices[name] = nn.Parameter(own)

    def get(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """This process's slice of a parameter, ``[numbers]``; the parameter if it has none."""
        return self._slices.get(name, parameter)

    def __contains__(self, name: str) -> bool:
        return name in self._slices

    def own(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This process's slice of a tensor of a parameter's shape."""
        if self._replicas.size == 1:
            return whole
        return whole.flatten().split(self._sizes(name))[self._replicas.rank]

    def sum_gradients(self) -> None:
        """Give each slice the sum of all replicas' gradients of it; parameters lose theirs."""
        size, rank = self._replicas.size, self._replicas.rank
        if size == 1:
            return
        pieces = []
        for name, parameter in self._parameters.items():
            assert parameter.grad is not None
            pieces.append(parameter.grad.flatten().split(self._sizes(name)))
            parameter.grad = None
        totals = self._totals()
        received = self._replicas.all_to_all(
            torch.cat(
                [piece for of_rank in zip(*pieces, strict=True) for piece in of_rank]
            ),
            [totals[rank]] * size,
            totals,
            "gradients of replicas",
        )
        sums = received.view(size, -1).sum(dim=0)
        slices = self._slices.values()
        for own, gradient in zip(
            slices, sums.split([len(s) for s in slices]), strict=True
        ):
            own.grad = gradient

    @torch.no_grad()
    def share_values(self) -> None:
        """Give all replicas' parameters each replica's slices."""
        if self._replicas.size == 1:
            return
        own = torch.cat([piece.data for piece in self._slices.values()])
        shared = self._replicas.all_gather(own, "slices of replicas", self._totals())
        for rank, values in enumerate(shared):
            sizes = [self._sizes(name)[rank] for name in self._parameters]
            for name, value in zip(self._parameters, values.split(sizes), strict=True):
                numbers = self._parameters[name].data.view(-1)
                numbers.split(self._sizes(name))[rank].copy_(value)

    def whole(self, name: str, own: torch.Tensor) -> torch.Tensor:
        """A tensor of a parameter's shape, from its slices; all replicas call this together."""
        if self._replicas.size == 1:
            return own
        sizes = self._sizes(name)
        parts = self._replicas.all_gather(own, "slices of replicas", sizes)
        return torch.cat(parts).view(self._parameters[name].shape)

    def _sizes(self, name: str) -> list[int]:
        """Numbers in each replica's slice; the first ones are as long as can be."""
        numbers, size = self._parameters[name].numel(), self._replicas.size
        most = -(-numbers // size)
        return [min(most, max(0, numbers - r * most)) for r in range(size)]

    def _totals(self) -> list[int]:
        """Numbers in all slices of each replica."""
        sizes = [self._sizes(name) for name in self._parameters]
        return [sum(of_rank) for of_rank in zip(*sizes, strict=True)]

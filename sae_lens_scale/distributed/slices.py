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
        if self._replicas.size == 1:
            return
        for name, parameter in self._parameters.items():
            assert parameter.grad is not None
            sizes = self._sizes(name)
            own = sizes[self._replicas.rank]
            parts = self._replicas.all_to_all(
                parameter.grad.flatten(),
                [own] * len(sizes),
                sizes,
                "gradients of replicas",
            )
            self._slices[name].grad = parts.view(len(sizes), own).sum(dim=0)
            parameter.grad = None

    @torch.no_grad()
    def share_values(self) -> None:
        """Give all replicas' parameters each replica's slices."""
        if self._replicas.size == 1:
            return
        for name, parameter in self._parameters.items():
            whole = self.whole(name, self._slices[name].data)
            parameter.data.copy_(whole)

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

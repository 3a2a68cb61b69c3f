"""Ownership of experts: which process of a group holds which."""

from dataclasses import dataclass
from functools import cache

import torch

from .groups import Group

# Dimensions of parameters that count experts or their latents. All others are the same on
# every process.
EXPERT_DIMENSIONS = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "omega": 0}
# Numbers that are sent at a time.
_AT_A_TIME = 1 << 20


def of_first(tensor: torch.Tensor, device: torch.device, world: Group) -> torch.Tensor:
    """
    The first process's tensor, on all; contiguous.

    Args:
        tensor: The tensor on the first process; one of its shape on the others, which may be on
            the meta device.
        device: Device of the result.
        world: All processes, which call this together.
    """
    if tensor.is_meta:
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return world.broadcast(tensor.detach().contiguous(), "start")


@dataclass(frozen=True)
class Ownership:
    """
    The experts that the processes of a group hold.

    All hold the shared experts, which every token selects, so that none gets all tokens. The
    others are held by one each: as many neighbouring experts as possible, equally many, or
    one more.

    Attributes:
        num_experts: Number of experts.
        num_shared: Number of them, the first ones, that are shared.
        rank: Place of this process.
        size: Number of processes.
    """

    num_experts: int
    num_shared: int
    rank: int
    size: int

    def __post_init__(self) -> None:
        if self.num_routed < self.size:
            raise ValueError(
                f"expert_parallel must be at most the {self.num_routed} experts that are "
                f"not shared, got {self.size}"
            )

    @property
    def num_routed(self) -> int:
        """Number of experts that are not shared."""
        return self.num_experts - self.num_shared

    def first(self, rank: int) -> int:
        """First of the experts that a process alone holds."""
        return self.num_shared + rank * self.num_routed // self.size

    def held(self, rank: int) -> list[int]:
        """Numbers of a process's experts, in the order of its weights."""
        own = range(self.first(rank), self.first(rank + 1))
        return [*range(self.num_shared), *own]

    def whole_shape(self, name: str, part: torch.Tensor) -> list[int]:
        """Shape of a parameter, given this process's part."""
        shape = list(part.shape)
        if self.size > 1 and name in EXPERT_DIMENSIONS:
            dim = EXPERT_DIMENSIONS[name]
            shape[dim] = shape[dim] // len(self.held(self.rank)) * self.num_experts
        return shape

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This process's part of a parameter, or of a tensor of its shape; copied."""
        if self.size == 1 or name not in EXPERT_DIMENSIONS:
            return whole.clone()
        dim = EXPERT_DIMENSIONS[name]
        held = torch.tensor(self.held(self.rank), device=whole.device)
        experts = whole.unflatten(dim, (self.num_experts, -1))
        return experts.index_select(dim, held).flatten(dim, dim + 1)

    def share(
        self, name: str, whole: torch.Tensor, device: torch.device, world: Group
    ) -> torch.Tensor:
        """
        This process's part of the first one's parameter, which is sent some experts at a time.

        Args:
            name: The parameter's name.
            whole: The parameter; on all processes but the first it may be on the meta device.
            device: Device of the part.
            world: All processes, which call this together.
        """
        if self.size == 1 or name not in EXPERT_DIMENSIONS:
            return of_first(whole, device, world)
        dim = EXPERT_DIMENSIONS[name]
        held = self.held(self.rank)
        experts = whole.unflatten(dim, (self.num_experts, -1))
        shape = list(experts.shape)
        shape[dim] = len(held)
        part = torch.empty(shape, dtype=whole.dtype, device=device)
        step = max(1, _AT_A_TIME * self.num_experts // whole.numel())
        for first in range(0, self.num_experts, step):
            number = min(step, self.num_experts - first)
            piece = of_first(experts.narrow(dim, first, number), device, world)
            for place, expert in enumerate(held):
                if first <= expert < first + number:
                    part.select(dim, place).copy_(piece.select(dim, expert - first))
        return part.flatten(dim, dim + 1)

    def gather(
        self, name: str, part: torch.Tensor, whole: torch.Tensor | None, world: Group
    ) -> None:
        """
        Gather a parameter, or a tensor of its shape, from its parts, some experts at a time.

        Args:
            name: The parameter's name.
            part: This process's part.
            whole: The tensor to fill, on the first process; None on the others.
            world: All processes, of which the first ones hold the parts and call this together.
        """
        part = part.detach()
        if self.size == 1 or name not in EXPERT_DIMENSIONS:
            if whole is not None:
                whole.copy_(part)
            return
        dim = EXPERT_DIMENSIONS[name]
        held = self.held(self.rank)
        own = part.unflatten(dim, (len(held), -1))
        experts = None
        if whole is not None:
            experts = whole.unflatten(dim, (self.num_experts, -1))
            experts.narrow(dim, 0, len(held)).copy_(own)
        step = max(1, _AT_A_TIME * len(held) // own.numel())
        for rank in range(1, self.size):
            end = self.first(rank + 1)
            for first in range(self.first(rank), end, step):
                number = min(step, end - first)
                if self.rank == rank:
                    place = held.index(first)
                    piece = own.narrow(dim, place, number).cpu().contiguous()
                    world.send_to_first(piece, rank, "whole SAE")
                elif experts is not None:
                    target = experts.narrow(dim, first, number)
                    piece = own.new_empty(target.shape, device="cpu")
                    world.send_to_first(piece, rank, "whole SAE")
                    target.copy_(piece)

    @cache
    def places(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Owner of each expert and its place in the owner's weights, ``[num_experts]`` each."""
        owners = torch.full((self.num_experts,), self.rank)
        places = torch.arange(self.num_experts)
        for rank in range(self.size):
            own = slice(self.first(rank), self.first(rank + 1))
            owners[own] = rank
            places[own] += self.num_shared - self.first(rank)
        return owners.to(device), places.to(device)

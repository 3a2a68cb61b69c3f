"""SAEs whose tokens are shared out among processes."""

import math
from abc import ABC
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import nn
from typing_extensions import override

from sae_lens_scale.saes.mixture.routing import Routing, expert_counts
from sae_lens_scale.saes.mixture.training import MixtureTrainingSAE

from .groups import Mesh, on_first
from .ownership import Ownership

# Of a file's zeros.
_BYTES_AT_A_TIME = 1 << 20


class DataParallelSAE(MixtureTrainingSAE[Any], ABC):
    """
    A training SAE that is given some of each batch's tokens.

    Its losses are this process's shares of the whole batch's: sums over processes, of losses
    and of gradients, are those of one process that is given all tokens.
    """

    mesh: Mesh
    ownership: Ownership
    # The class that was shared out.
    ordinary: type[MixtureTrainingSAE[Any]]
    # While a training step goes on: selections of each expert, and tokens, of the whole batch.
    _counts: torch.Tensor | None = None
    _is_counting = False

    @property
    def batch_tokens(self) -> torch.Tensor:
        """Number of tokens of the whole batch, in the last training step, a scalar."""
        assert self._counts is not None
        return self._counts[-1]

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        self._counts, self._is_counting = None, True
        try:
            return super().training_forward_pass(step_input)
        finally:
            self._is_counting = False

    @override
    def _route(self, router_in: torch.Tensor) -> Routing:
        routing = super()._route(router_in)
        if self._is_counting and self._counts is None:
            counts = expert_counts(routing.indices, self.cfg.num_experts)
            tokens = routing.indices.shape[:-1].numel()
            # new_tensor would wait for the GPU.
            counts = torch.cat([counts, counts.new_full((1,), tokens)])
            self._counts = self.mesh.world.all_reduce(counts, "load")
        return routing

    @override
    def batch_mean(self, values: torch.Tensor) -> torch.Tensor:
        # In float16 a sum over a batch overflows where its mean does not.
        dtype = torch.promote_types(values.dtype, torch.float32)
        mean = values.sum(dim=0, dtype=dtype) / self.batch_tokens
        return mean.to(values.dtype)

    @override
    def batch_load(self, routing: Routing, dtype: torch.dtype) -> torch.Tensor:
        assert self._counts is not None
        routed = self._counts[self.cfg.num_shared_experts : -1].to(dtype)
        return routed / routed.sum()

    @override
    def _require_finite(
        self, losses: dict[str, torch.Tensor], step_input: TrainStepInput
    ) -> None:
        # The trainer looks at those of the whole batch: all processes have to stop.
        pass

    @override
    @torch.compiler.disable()
    @torch.no_grad()
    def _start_from_first_batches(self, sae_in: torch.Tensor) -> None:
        batch = torch.cat(self.mesh.world.all_gather(sae_in, "start"))
        super()._start_from_first_batches(batch)
        for tensor in (self.W_router, self.b_router, self.b_dec):
            # The same everywhere but for rounding, on machines that differ.
            self.mesh.world.broadcast(tensor.data, "start")

    def whole(self, folder: str | Path | None = None) -> MixtureTrainingSAE[Any] | None:
        """
        Gather an ordinary SAE on the first process; all processes call this together.

        Args:
            folder: Folder of the disk that holds the weights meanwhile; None for the system's
                for temporary files.

        Returns:
            The SAE, on the CPU; None on the other processes.
        """
        parameters = dict(self.named_parameters())
        gathered = {
            name: self.gathered(name, p, folder) for name, p in parameters.items()
        }
        if self.mesh.world.rank:
            return None
        cfg = deepcopy(self.cfg)
        # Without weights of its own, nor random numbers, which later batches depend on.
        cfg.device = "meta"
        sae = self.ordinary(cfg)
        sae.device = torch.device("cpu")
        sae._end_start()
        for name, tensor in gathered.items():
            assert tensor is not None
            requires_grad = parameters[name].requires_grad
            set_tensor(sae, name, nn.Parameter(tensor, requires_grad))
        for name, buffer in self.named_buffers():
            set_tensor(sae, name, buffer.detach().to("cpu", copy=True))
        cfg.device = torch.device(self.cfg.device).type
        return sae

    def gathered(
        self, name: str, part: torch.Tensor, folder: str | Path | None = None
    ) -> torch.Tensor | None:
        """
        Gather a parameter, or a tensor of its shape; all processes call this together.

        Args:
            name: Name of the parameter.
            part: This process's part.
            folder: As of :meth:`whole`.

        Returns:
            The whole, in memory of a file; None on all processes but the first.

        Raises:
            OSError: If the disk has no room for it.
            RuntimeError: Then on the other processes.
        """
        mesh, shape = self.mesh, self.ownership.whole_shape(name, part)
        whole = on_first(mesh.world, lambda: mapped_tensor(shape, part.dtype, folder))
        if mesh.replicas.rank == 0:
            self.ownership.gather(name, part, whole, mesh.world)
        return whole

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        whole = self.whole(path)
        on_first(self.mesh.world, lambda: whole and whole.save_model(path))
        return _paths(path)

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        whole = self.whole(path)
        on_first(self.mesh.world, lambda: whole and whole.save_inference_model(path))
        return _paths(path)


def set_tensor(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Set a parameter or a buffer of a module, or of one within it, by its dotted name."""
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, tensor)


def mapped_tensor(
    shape: Sequence[int], dtype: torch.dtype, folder: str | Path | None
) -> torch.Tensor:
    """
    Make a tensor in memory that is a file's: the system may write it out to the disk.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        folder: Folder for the file, which is made if it is missing; None for the system's for
            temporary files. No file is left there.

    Returns:
        Zeros.

    Raises:
        OSError: If the disk has no room for it.
    """
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    numbers = math.prod(shape)
    with NamedTemporaryFile(prefix=".saving-", dir=folder, buffering=0) as file:
        # Written: a disk that is full would end the process when it writes into memory.
        rest = numbers * dtype.itemsize
        while rest:
            rest -= file.write(bytes(min(rest, _BYTES_AT_A_TIME)))
        tensor = torch.from_file(file.name, shared=True, size=numbers, dtype=dtype)
    return tensor.view(*shape)


def _paths(path: str | Path) -> tuple[Path, Path]:
    return Path(path, SAE_WEIGHTS_FILENAME), Path(path, SAE_CFG_FILENAME)

"""SAEs whose tokens, or tokens and experts, are shared out among processes."""

from abc import ABC
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import nn
from typing_extensions import override

from sae_lens_scale.saes.mixture.config import MixtureTrainingSAEConfig
from sae_lens_scale.saes.mixture.dispatch import Rows
from sae_lens_scale.saes.mixture.encoding import Encoding, Inputs
from sae_lens_scale.saes.mixture.extension_points import is_hooked, is_overridden
from sae_lens_scale.saes.mixture.routing import Routing
from sae_lens_scale.saes.mixture.training import MixtureTrainingSAE

from .exchange import (
    EXPERT_DIMENSIONS,
    OwnedRows,
    Ownership,
    require_topk,
    send_to_owners,
)
from .groups import Mesh, on_first

# Methods whose results would need all of a token's experts, or all latents.
_NOT_OVERRIDDEN = ("dispatch", "combine", "decode", "encode_with_hidden_pre")


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
    def batch_tokens(self) -> int:
        """Number of tokens of the whole batch, in the last training step."""
        assert self._counts is not None
        return int(self._counts[-1])

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
            N = self.cfg.num_experts
            counts = torch.bincount(routing.indices.flatten(), minlength=N)
            tokens = routing.indices.shape[:-1].numel()
            counts = torch.cat([counts, counts.new_tensor([tokens])])
            self._counts = self.mesh.world.all_reduce(counts, "load")
        return routing

    @override
    def batch_mean(self, values: torch.Tensor) -> torch.Tensor:
        assert self._counts is not None
        # In float16 a sum over a batch overflows where its mean does not.
        dtype = torch.promote_types(values.dtype, torch.float32)
        mean = values.sum(dim=0, dtype=dtype) / self._counts[-1]
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

    def whole(self) -> MixtureTrainingSAE[Any] | None:
        """
        Gather an ordinary SAE on the first process; all processes call this together.

        Returns:
            The SAE, on the CPU; None on the other processes.
        """
        gathered = {name: self.gathered(name, p) for name, p in self.named_parameters()}
        if self.mesh.world.rank:
            return None
        cfg = deepcopy(self.cfg)
        cfg.device = "cpu"
        # A new SAE draws weights, on the CPU: not from the numbers that later batches depend
        # on.
        with torch.random.fork_rng(devices=[]):
            sae = self.ordinary(cfg)
        for name, tensor in gathered.items():
            assert tensor is not None
            sae.get_parameter(name).data = tensor
        cfg.device = torch.device(self.cfg.device).type
        return sae

    def gathered(self, name: str, part: torch.Tensor) -> torch.Tensor | None:
        """
        Gather a parameter, or a tensor of its shape; all processes call this together.

        Args:
            name: Name of the parameter.
            part: This process's part.

        Returns:
            The whole, on the CPU; None on all processes but the first.
        """
        whole = self.ownership.gathered(name, part, self.mesh.experts)
        return whole if self.mesh.world.rank == 0 else None

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        whole = self.whole()
        on_first(self.mesh.world, lambda: whole and whole.save_model(path))
        return _paths(path)

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        whole = self.whole()
        on_first(self.mesh.world, lambda: whole and whole.save_inference_model(path))
        return _paths(path)


def _paths(path: str | Path) -> tuple[Path, Path]:
    return Path(path, SAE_WEIGHTS_FILENAME), Path(path, SAE_CFG_FILENAME)


class ExpertParallelSAE(DataParallelSAE, ABC):
    """
    A training SAE that holds some of the experts.

    Tokens travel to the processes that hold their experts, and reconstructions travel back.
    All processes that share out the experts have to call it together, whatever it is asked.
    Latents of ``feature_acts`` in a training step are those of the experts that it holds,
    of the tokens that came: ``[pairs, held latents]``, a row for each of a token's experts.
    """

    @property
    @override
    def num_held_experts(self) -> int:
        return len(self.ownership.held(self.ownership.rank))

    @override
    def _held(self, per_expert: torch.Tensor) -> torch.Tensor:
        return per_expert[self.ownership.held(self.ownership.rank)]

    @override
    @torch.no_grad()
    def _of_all_experts(self, held: torch.Tensor) -> torch.Tensor:
        own = self.ownership
        mine = held[own.num_shared if own.rank else 0 :]
        return torch.cat(self.mesh.experts.all_gather(mine, "metrics"))

    @override
    def _require_sizes(self, tensors: Mapping[str, torch.Tensor]) -> None:
        whole = dict(tensors)
        for name in EXPERT_DIMENSIONS.keys() & tensors.keys():
            shape = list(tensors[name].shape)
            shape[EXPERT_DIMENSIONS[name]] *= self.cfg.num_experts
            shape[EXPERT_DIMENSIONS[name]] //= self.num_held_experts
            whole[name] = torch.empty(shape, device="meta")
        super()._require_sizes(whole)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        require_shardable(self)
        return super().training_forward_pass(step_input)

    @override
    def _encode(
        self, x: torch.Tensor, runners_up: int = 0, with_all_pre_acts: bool = False
    ) -> Encoding:
        if with_all_pre_acts or is_hooked(self.hook_sae_acts_pre):
            raise ValueError(
                "encode_with_hidden_pre and a hook on hook_sae_acts_pre need pre-activations "
                "that no process has where experts are shared out among processes"
            )
        return super()._encode(x, runners_up)

    @override
    def dispatch(self, inputs: Inputs, routing: Routing) -> Rows:
        rows = super().dispatch(inputs, routing)
        return send_to_owners(rows, self.ownership, self.mesh.experts)

    @override
    def combine(self, partial: torch.Tensor, rows: Rows) -> torch.Tensor:
        assert isinstance(rows, OwnedRows)
        return rows.combine(partial)

    @override
    @torch.no_grad()
    def _feature_acts(self, encoding: Encoding) -> torch.Tensor:
        rows, n = encoding.rows, self.cfg.expert_size
        assert isinstance(rows, OwnedRows)
        latents, route = encoding.latents, rows.route
        acts = latents.values.new_zeros(len(latents.values), n)
        # A latent that is masked has activation 0, and may be named twice.
        acts.scatter_add_(1, latents.indices % n, latents.values)
        home = torch.empty(
            len(route.pair_slots), n, dtype=acts.dtype, device=acts.device
        )
        home[route.pair_slots] = route.pairs_home(acts, "activations")
        experts = encoding.routing.indices
        wide = home.new_zeros(*experts.shape[:-1], self.cfg.num_experts, n)
        index = experts.unsqueeze(-1).expand(*experts.shape, n)
        wide.scatter_(-2, index, home.view(*experts.shape, n))
        return wide.flatten(-2)

    @override
    @torch.no_grad()
    def _decode_dense(self, feature_acts: torch.Tensor) -> torch.Tensor:
        group, own = self.mesh.experts, self.ownership
        N, n, S = self.cfg.num_experts, self.cfg.expert_size, own.num_shared
        experts = feature_acts.view(-1, N, n)
        tokens = group.lengths(feature_acts, "activations")
        parts = []
        for rank in range(group.size):
            part = experts[:, own.held(rank)]
            if rank != own.rank:
                # Shared experts are decoded at home.
                part[:, :S] = 0
            parts.append(part.flatten())
        width = self.num_held_experts * n
        received = group.all_to_all(
            torch.cat(parts),
            [t * width for t in tokens],
            [part.numel() for part in parts],
            "activations",
        )
        recons = super()._decode_dense(received.view(-1, width))
        mine = [len(experts)] * group.size
        home = group.all_to_all(recons, mine, tokens, "reconstructions")
        # A size of -1 would be ambiguous without tokens.
        return home.view(group.size, len(experts), home.shape[-1]).sum(0)


def distribute(sae: MixtureTrainingSAE[Any], mesh: Mesh) -> DataParallelSAE:
    """
    Share out an SAE's tokens, and its experts, among processes; in place.

    Args:
        sae: The SAE, as on all processes. All get the first one's weights.
        mesh: The processes.

    Returns:
        The SAE, of a subclass of its class.

    Raises:
        ValueError: As :func:`make_ownership` and :func:`require_ordinary`; if experts are to be
            shared out, and the SAE has hooks, another selection than TopK, or overrides one of
            these methods.
    """
    require_ordinary(sae)
    ownership = make_ownership(sae.cfg, mesh)
    base = DataParallelSAE
    if mesh.experts.size > 1:
        for name in _NOT_OVERRIDDEN:
            if is_overridden(sae, name):
                raise ValueError(
                    f"{name} must not be overridden where experts are shared out among "
                    f"processes, got {type(sae).__name__}"
                )
        require_shardable(sae)
        base = ExpertParallelSAE
    tensors = [p.data for p in sae.parameters()]
    if sae._fresh_router is not None:
        tensors.append(sae._fresh_router)
    for tensor in tensors:
        mesh.world.broadcast(tensor, "start")
    ordinary = type(sae)
    name = f"{base.__name__.removesuffix('SAE')}{ordinary.__name__}"
    # Its methods are ours: SAELens's extension points see the ordinary class's.
    sae.__class__ = type(name, (base, ordinary), {"ordinary": ordinary})
    assert isinstance(sae, DataParallelSAE)
    sae.mesh, sae.ownership = mesh, ownership
    for name, parameter in list(sae.named_parameters()):
        part = ownership.part(name, parameter.detach())
        setattr(sae, name, nn.Parameter(part, parameter.requires_grad))
    return sae


def require_ordinary(sae: Any) -> None:
    """
    Refuse an SAE that has been shared out.

    Raises:
        ValueError: If it has been.
    """
    if isinstance(sae, DataParallelSAE):
        raise ValueError(
            "the SAE has been shared out among processes by an earlier run, whose run() "
            "returned the trained one on the first process: each run needs an SAE of its own"
        )


def make_ownership(cfg: Any, mesh: Mesh) -> Ownership:
    """
    Say which experts a process holds.

    Args:
        cfg: Config of the SAE.
        mesh: The processes.

    Raises:
        ValueError: If it is no config of an SAE of this package; if experts are to be shared
            out, and there are fewer than processes, or use_sparse_activations is False.
    """
    if not isinstance(cfg, MixtureTrainingSAEConfig):
        raise ValueError(
            "architecture must be scale or switch, to be trained by several processes, got "
            f"{cfg.architecture()}"
        )
    experts = mesh.experts
    if experts.size > 1 and not cfg.use_sparse_activations:
        raise ValueError(
            "use_sparse_activations must be True where experts are shared out among "
            "processes, got False"
        )
    num_shared = cfg.num_shared_experts if experts.size > 1 else 0
    return Ownership(cfg.num_experts, num_shared, experts.rank, experts.size)


def require_shardable(sae: MixtureTrainingSAE[Any]) -> None:
    """
    Refuse an SAE whose experts cannot be shared out as it is.

    Raises:
        ValueError: If somebody hooks it, or its selection is no TopK of each token.
    """
    require_topk(sae.selection())
    for name, hook in sae.hook_dict.items():
        if is_hooked(hook):
            raise ValueError(
                f"{name} must have no hook where experts are shared out among processes, "
                "none of which sees a whole batch"
            )

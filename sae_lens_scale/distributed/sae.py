"""Sharing out of an SAE among processes."""

from typing import Any

from torch import nn

from sae_lens_scale.saes.mixture.config import MixtureTrainingSAEConfig
from sae_lens_scale.saes.mixture.extension_points import is_overridden
from sae_lens_scale.saes.mixture.training import MixtureTrainingSAE

from .data_parallel import DataParallelSAE, set_tensor
from .expert_parallel import ExpertParallelSAE, require_shardable
from .groups import Mesh
from .ownership import Ownership, of_first

# Methods whose results would need all of a token's experts, or all latents.
_NOT_OVERRIDDEN = ("dispatch", "choose", "combine", "decode", "encode_with_hidden_pre")


def distribute(sae: MixtureTrainingSAE[Any], mesh: Mesh) -> DataParallelSAE:
    """
    Share out an SAE's tokens, and its experts, among processes; in place.

    Args:
        sae: The SAE, as on all processes. All get the first one's weights; the others' may be
            on the meta device.
        mesh: The processes.

    Returns:
        The SAE, of a subclass of its class.

    Raises:
        ValueError: As :func:`make_ownership` and :func:`require_ordinary`; if the selection
            needs the whole batch; if experts are to be shared out, and the SAE has hooks,
            another selection than TopK, or overrides one of these methods.
    """
    require_ordinary(sae)
    ownership = make_ownership(sae.cfg, mesh)
    if mesh.world.size > 1 and not sae.selection().per_token:
        raise ValueError(
            "selection must be one of each token where several processes share out a batch, "
            f"got {type(sae).__name__}'s, with per_token=False"
        )
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
    if sae._fresh_router is not None:
        sae._fresh_router = of_first(sae._fresh_router, sae.device, mesh.world)
    for name, buffer in list(sae.named_buffers()):
        set_tensor(sae, name, of_first(buffer, sae.device, mesh.world))
    ordinary = type(sae)
    name = f"{base.__name__.removesuffix('SAE')}{ordinary.__name__}"
    # Its methods are ours: SAELens's extension points see the ordinary class's.
    sae.__class__ = type(name, (base, ordinary), {"ordinary": ordinary})
    assert isinstance(sae, DataParallelSAE)
    sae.mesh, sae.ownership = mesh, ownership
    for name, parameter in list(sae.named_parameters()):
        part = ownership.share(name, parameter.detach(), sae.device, mesh.world)
        set_tensor(sae, name, nn.Parameter(part, parameter.requires_grad))
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

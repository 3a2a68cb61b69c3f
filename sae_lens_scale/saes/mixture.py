"""What Scale SAE and Switch SAE share, for inference."""

import os
import tempfile
from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from einops import rearrange
from sae_lens.saes.sae import SAE, SAEConfig
from sae_lens.util import dtype_to_str
from torch import nn
from transformer_lens.hook_points import HookPoint
from typing_extensions import override

from sae_lens_scale.ops import (
    GateName,
    SparseLatents,
    TopKOver,
    decoder_norm,
    grouped_encode,
    select_topk,
    sparse_decode,
)
from sae_lens_scale.routing import Routing, route

# What SAELens's run-time activation normalisation leaves on the SAE between encode
# and decode.
_RUN_TIME_NORM_STATE = ("x_norm_coeff", "ln_mu", "ln_std")


@dataclass
class MixtureSAEConfig(SAEConfig, ABC):
    """
    Fields that the configs of all mixture-of-experts SAEs share.

    Args:
        num_experts (int): Number of experts; divides d_sae.
        k (int): Number of latents kept per token, over all its experts together.
        gate (GateName): What multiplies a selected expert's activations.
        topk_over (TopKOver): Whether TopK ranks activations before or after the gate.
        rescale_acts_by_decoder_norm (bool): Whether to treat the decoder as if its
            rows had unit norm, by moving their norms into the activations.
    """

    num_experts: int = 32
    k: int = 32
    gate: GateName = "softmax"
    topk_over: TopKOver = "activations"
    rescale_acts_by_decoder_norm: bool = False

    @property
    def experts_per_token(self) -> int:
        """How many experts each token selects."""
        return 1

    @property
    def expert_size(self) -> int:
        """Latents per expert."""
        return self.d_sae // self.num_experts

    @override
    def __post_init__(self) -> None:
        # These would train, and then fail when the config is written as JSON.
        for field in fields(self):
            setattr(self, field.name, _to_json_type(getattr(self, field.name)))
        super().__post_init__()
        for name in ("d_in", "d_sae", "num_experts", "experts_per_token", "k"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.d_sae % self.num_experts:
            raise ValueError(
                f"d_sae must be divisible by num_experts, got d_sae={self.d_sae} "
                f"and num_experts={self.num_experts}"
            )
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token must be at most num_experts={self.num_experts}, "
                f"got {self.experts_per_token}"
            )
        candidates = self.experts_per_token * self.expert_size
        if self.k > candidates:
            raise ValueError(
                f"k must be at most the {candidates} latents of a token's experts "
                f"(experts_per_token={self.experts_per_token} times d_sae / "
                f"num_experts={self.expert_size}), got {self.k}"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            # A string such as "False", from a JSON file, would count as true.
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{field.name} must be a bool, got {value!r}")
        require_choice("gate", self.gate, GateName)
        require_choice("topk_over", self.topk_over, TopKOver)


def _to_json_type(value: Any) -> Any:
    """Numpy's scalars (of a sweep, say), dtypes and devices as JSON can hold them."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.dtype):
        return dtype_to_str(value)
    return str(value) if isinstance(value, torch.device) else value


def require_choice(name: str, value: Any, choices: Any) -> Any:
    """Return ``value`` if it is one of a Literal's, else raise ValueError."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {get_args(choices)}, got {value!r}")
    return value


@contextmanager
def replacing_files(folder: str | Path) -> Iterator[Path]:
    """
    A folder to write into, whose files replace those of ``folder`` once all are written.

    Whatever stops the writing, ``folder`` keeps the files that it had.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        yield Path(temporary)
        for file in Path(temporary).iterdir():
            os.replace(file, folder / file.name)


def is_hooked(hook: nn.Module) -> bool:
    """Whether anybody watches or edits what passes a hook point."""
    return bool(hook._forward_hooks or hook._backward_hooks)


T_MIXTURE_CONFIG = TypeVar("T_MIXTURE_CONFIG", bound=MixtureSAEConfig)


class Encoding(NamedTuple):
    """
    All that encoding a batch computes, compactly.

    Attributes:
        routing: The experts that each token selected, and their gates.
        pre_acts: Pre-activations of their latents, as TopK ranks them before any
            gate, ``[..., experts_per_token, expert_size]``.
        latents: The latents that survived, ``[..., k]``.
    """

    routing: Routing
    pre_acts: torch.Tensor
    latents: SparseLatents


class MixtureSAE(SAE[T_MIXTURE_CONFIG], ABC):
    """
    An SAE whose latents are divided among experts that a router selects.

    ``hook_expert_weights`` and ``hook_expert_indices`` show, and may edit, the gates
    and indices of the selected experts, both ``[..., experts_per_token]``. An expert
    that an edit selects twice counts twice: its latents take two of the k places each,
    and what they have in both adds up.
    ``hook_sae_acts_pre`` is d_sae wide, as in any SAE of SAELens; latents whose
    expert was not selected have no pre-activation and show -inf.
    """

    b_enc: nn.Parameter
    W_router: nn.Parameter
    b_router: nn.Parameter

    def __init__(self, cfg: T_MIXTURE_CONFIG, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self.hook_expert_weights = HookPoint()
        self.hook_expert_indices = HookPoint()
        self.setup()

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        cfg = self.cfg
        like: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, **like))
        # nn.Linear's bound for d_in inputs.
        self.W_router = nn.Parameter(
            torch.empty(cfg.d_in, cfg.num_experts, **like).uniform_(
                -(cfg.d_in**-0.5), cfg.d_in**-0.5
            )
        )
        self.b_router = nn.Parameter(torch.zeros(cfg.d_in, **like))

    @override
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """
        Feature activations, gates included.

        Args:
            x: Activations of the language model, ``[..., d_in]``.

        Returns:
            ``[..., d_sae]``, at most k of them non-zero.

        Raises:
            ValueError: If the last dimension of ``x`` is not d_in.
        """
        latents = self._encode(x).latents
        return self.hook_sae_acts_post(latents.to_dense(self.cfg.d_sae))

    def _encode(self, x: torch.Tensor) -> Encoding:
        router_in, sae_in = self._process_inputs(x)
        routing = self._route(router_in)
        pre_acts = self._pre_acts(sae_in, routing.indices)
        gates = routing.weights.to(pre_acts.dtype)
        latents = select_topk(
            pre_acts, gates, routing.indices, self.cfg.k, self.cfg.topk_over
        )
        return Encoding(routing, pre_acts, latents)

    @override
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """
        Reconstruction from feature activations; linear in them, up to normalisation.

        Args:
            feature_acts: ``[..., d_sae]``, dense or sparse COO.

        Returns:
            ``[..., d_in]``.

        Raises:
            ValueError: If the last dimension of ``feature_acts`` is not d_sae.
        """
        # Norms would stretch a last dimension of 1 to d_sae without an error.
        if feature_acts.shape[-1:] != (self.cfg.d_sae,):
            raise ValueError(
                f"the last dimension of feature_acts must be d_sae={self.cfg.d_sae}, "
                f"got shape {tuple(feature_acts.shape)}"
            )
        if feature_acts.is_sparse:
            feature_acts = feature_acts.to_dense()
        if self.cfg.rescale_acts_by_decoder_norm:
            feature_acts = feature_acts * (1 / decoder_norm(self.W_dec))
        return self._finish_decoding(feature_acts @ self.W_dec)

    def _decode_latents(self, latents: SparseLatents) -> torch.Tensor:
        """What decode returns for the same activations, from their compact form."""
        values = latents.values
        if self.cfg.rescale_acts_by_decoder_norm:
            values = values * (1 / decoder_norm(self.W_dec))[latents.indices]
        flat = SparseLatents(
            values.reshape(-1, values.shape[-1]),
            latents.indices.reshape(-1, values.shape[-1]),
        )
        recons = sparse_decode(flat, self.W_dec)
        return self._finish_decoding(recons.view(*values.shape[:-1], self.cfg.d_in))

    def _finish_decoding(self, recons: torch.Tensor) -> torch.Tensor:
        recons = self.hook_sae_recons(recons + self.b_dec)
        recons = self.run_time_activation_norm_fn_out(recons)
        return self.reshape_fn_out(recons, self.d_head)

    def route(self, x: torch.Tensor) -> Routing:
        """
        The experts that each token selects, for analysis.

        Args:
            x: Activations of the language model, ``[..., d_in]``.

        Returns:
            Gates, indices and probabilities; fires the hooks that encode fires.

        Raises:
            ValueError: If the last dimension of ``x`` is not d_in.
        """
        with self._keep_run_time_norm_state():
            return self._route(self._process_inputs(x)[0])

    @contextmanager
    def _keep_run_time_norm_state(self) -> Iterator[None]:
        """For normalising without a decode; one that is pending stays undisturbed."""
        state = vars(self)
        pending = {name: state[name] for name in _RUN_TIME_NORM_STATE if name in state}
        try:
            yield
        finally:
            for name in _RUN_TIME_NORM_STATE:
                state.pop(name, None)
            state.update(pending)

    def _route(self, router_in: torch.Tensor) -> Routing:
        routing = route(
            router_in,
            self.W_router,
            self.b_router,
            self.cfg.experts_per_token,
            self.cfg.gate,
        )
        # Indices first: whoever edits weights needs to know whose they are.
        indices = self.hook_expert_indices(routing.indices)
        if is_hooked(self.hook_expert_indices):
            self._require_expert_indices(indices, routing.indices.shape)
        weights = self.hook_expert_weights(routing.weights)
        if weights.shape != routing.weights.shape:
            raise ValueError(
                f"hook_expert_weights must keep the shape "
                f"{tuple(routing.weights.shape)}, got {tuple(weights.shape)}"
            )
        return routing._replace(indices=indices, weights=weights)

    def _require_expert_indices(self, indices: torch.Tensor, shape: torch.Size) -> None:
        """Refuse edited indices that would run out of memory or out of bounds later."""
        if indices.shape != shape or indices.dtype != torch.int64:
            raise ValueError(
                f"hook_expert_indices must keep the shape {tuple(shape)} and int64, "
                f"got {tuple(indices.shape)} and {indices.dtype}"
            )
        bad = indices[(indices < 0) | (indices >= self.cfg.num_experts)]
        if bad.numel():
            raise ValueError(
                f"hook_expert_indices must be in range(num_experts="
                f"{self.cfg.num_experts}), got {bad[0].item()}"
            )

    @override
    def process_sae_in(self, sae_in: torch.Tensor) -> torch.Tensor:
        return self._process_inputs(sae_in)[1]

    def _process_inputs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs of the router and of the encoder: before and after b_dec."""
        x = self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))
        # A last dimension of 1 would broadcast against b_dec without an error.
        if x.shape[-1:] != (self.cfg.d_in,):
            raise ValueError(
                f"the last dimension of x must be d_in={self.cfg.d_in}, "
                f"got shape {tuple(x.shape)}"
            )
        x = self.run_time_activation_norm_fn_in(x)
        return x, x - self.b_dec * self.cfg.apply_b_dec_to_input

    def _pre_acts(
        self, sae_in: torch.Tensor, expert_indices: torch.Tensor
    ) -> torch.Tensor:
        """Pre-activations ``[..., experts_per_token, expert_size]``, as TopK ranks them."""
        pre_acts = self._products(sae_in, expert_indices)
        pre_acts = pre_acts + self._by_expert(self.b_enc)[expert_indices]
        pre_acts = self._hook_pre_acts(pre_acts, expert_indices)
        if self.cfg.rescale_acts_by_decoder_norm:
            norms = self._by_expert(decoder_norm(self.W_dec))
            pre_acts = pre_acts * norms[expert_indices]
        return pre_acts

    def _products(
        self, sae_in: torch.Tensor, expert_indices: torch.Tensor
    ) -> torch.Tensor:
        """Products of the input with the encoder of the selected experts."""
        products = grouped_encode(
            sae_in.reshape(-1, self.cfg.d_in),
            self.W_enc,
            expert_indices.reshape(-1, self.cfg.experts_per_token),
            self.cfg.num_experts,
        )
        return products.view(*expert_indices.shape, self.cfg.expert_size)

    def _hook_pre_acts(
        self, pre_acts: torch.Tensor, expert_indices: torch.Tensor
    ) -> torch.Tensor:
        # The d_sae-wide tensor costs more than the whole encoder: only on request.
        if not is_hooked(self.hook_sae_acts_pre):
            return pre_acts
        wide = self.hook_sae_acts_pre(self._to_wide(pre_acts, expert_indices))
        wide = self._by_expert(wide)
        return wide.gather(-2, expert_indices.unsqueeze(-1).expand_as(pre_acts))

    def _to_wide(
        self, pre_acts: torch.Tensor, expert_indices: torch.Tensor
    ) -> torch.Tensor:
        """Candidates spread over all d_sae latents, -inf at those of other experts."""
        cfg = self.cfg
        wide = pre_acts.new_full(
            (*pre_acts.shape[:-2], cfg.num_experts, cfg.expert_size), -torch.inf
        )
        index = expert_indices.unsqueeze(-1).expand_as(pre_acts)
        return wide.scatter_(-2, index, pre_acts).flatten(-2)

    def _by_expert(self, per_latent: torch.Tensor) -> torch.Tensor:
        """Split the last dimension into experts and their latents."""
        return rearrange(per_latent, "... (N n) -> ... N n", N=self.cfg.num_experts)

    def _fold_encoder(self) -> None:
        """Make W_enc the encoder that is applied; for folds that need it to be."""

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        self.W_router.data *= scaling_factor
        self.b_router.data /= scaling_factor

    @override
    @torch.no_grad()
    def fold_and_get_W_dec_norm(self) -> torch.Tensor:
        if not self.cfg.rescale_acts_by_decoder_norm:
            raise NotImplementedError(
                "folding decoder norms would change which latents TopK selects when "
                "rescale_acts_by_decoder_norm is False"
            )
        self._fold_encoder()
        return super().fold_and_get_W_dec_norm()

    @override
    @torch.no_grad()
    def fold_activation_whitening(
        self,
        mean: torch.Tensor,
        whitening_matrix: torch.Tensor,
        unwhitening_matrix: torch.Tensor,
    ) -> None:
        if self.cfg.rescale_acts_by_decoder_norm:
            # Unwhitening changes the decoder norms that TopK ranks by. Folded first,
            # they stay as they were.
            self.fold_W_dec_norm()
            self.cfg.rescale_acts_by_decoder_norm = False
        self._fold_encoder()
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)
        # The router sees (x - mean) M - b_router = (x - (b_router M^-1 + mean)) M.
        dtype = torch.promote_types(self.W_router.dtype, whitening_matrix.dtype)
        mean, whitening_matrix, unwhitening_matrix = (
            t.to(self.device, dtype)
            for t in (mean, whitening_matrix, unwhitening_matrix)
        )
        self.W_router.data.copy_(whitening_matrix @ self.W_router.data.to(dtype))
        self.b_router.data.copy_(
            self.b_router.data.to(dtype) @ unwhitening_matrix + mean
        )

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        # safetensors refuses views that are not contiguous. Entries are rebound,
        # never changed in place: they share memory with the live parameters.
        super().process_state_dict_for_saving(state_dict)
        for name, tensor in state_dict.items():
            state_dict[name] = tensor.contiguous()

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """
        Save weights and config. Files that ``path`` has already stay until the new ones
        are complete; these then replace them, one right after the other.

        Args:
            path: Folder, made if it is missing.

        Returns:
            Paths of the weights and of the config.
        """
        with replacing_files(path) as temporary:
            weights, cfg = super().save_model(temporary)
        return Path(path) / weights.name, Path(path) / cfg.name

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """
        Check that a file's tensors are those of this SAE, before any is loaded.

        Args:
            state_dict: What the file holds; subclasses adapt it in place.

        Raises:
            ValueError: If tensors are missing, unknown, of another shape or not of
                floating point; the message names all of them.
        """
        super().process_state_dict_for_loading(state_dict)
        self._require_tensors(state_dict, self._shapes_to_load(state_dict))

    def _shapes_to_load(self, state_dict: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """What a file has to hold, given what it does hold."""
        return self._shapes()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.named_parameters()}

    def _require_tensors(
        self, state_dict: dict[str, Any], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        problems = [f"{name} is missing" for name in shapes if name not in state_dict]
        for name, tensor in state_dict.items():
            if name not in shapes:
                problems.append(f"{name} is not part of it")
            elif tuple(tensor.shape) != shapes[name]:
                problems.append(
                    f"{name} must have shape {shapes[name]}, got {tuple(tensor.shape)}"
                )
            elif not tensor.is_floating_point():
                problems.append(f"{name} must be of floating point, got {tensor.dtype}")
        if problems:
            cfg = self.cfg
            raise ValueError(
                f"these are not the weights of a {cfg.architecture()!r} SAE with "
                f"d_in={cfg.d_in}, d_sae={cfg.d_sae} and "
                f"num_experts={cfg.num_experts}: {'; '.join(problems)}"
            )

"""How a mixture-of-experts SAE encodes, compactly: input, route, products, TopK."""

from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from einops import rearrange
from sae_lens.saes.sae import SAE
from torch import nn
from transformer_lens.hook_points import HookPoint
from typing_extensions import override

from sae_lens_scale.ops import (
    BufferPool,
    Selection,
    SparseLatents,
    decoder_norm,
    encoder_products,
    grouped_encode,
    select_topk,
    take,
)
from sae_lens_scale.saes.mixture.routing import Routing, route

from .config import MixtureSAEConfig

# What SAELens's run-time activation normalisation leaves on the SAE between encode
# and decode.
_RUN_TIME_NORM_STATE = ("x_norm_coeff", "ln_mu", "ln_std")

# Candidates that are ranked at a time on the CPU: what stays in a core's cache.
_CANDIDATES_AT_A_TIME = 1 << 17


def is_hooked(hook: nn.Module) -> bool:
    """Whether anybody watches or edits what passes a hook point."""
    return bool(
        hook._forward_hooks
        or hook._forward_pre_hooks
        or hook._backward_hooks
        or hook._backward_pre_hooks
    )


T_MIXTURE_CONFIG = TypeVar("T_MIXTURE_CONFIG", bound=MixtureSAEConfig)


class Inputs(NamedTuple):
    """
    What router and encoder see of a batch.

    Attributes:
        x: The router's input, normalised, ``[..., d_in]``.
        center: What the encoder's input is smaller by: b_dec, or zeros, ``[d_in]``.
    """

    x: torch.Tensor
    center: torch.Tensor

    @property
    def sae_in(self) -> torch.Tensor:
        """The encoder's input, ``[..., d_in]``."""
        return self.x - self.center


class Kept(NamedTuple):
    """
    Which of a token's candidates are encoded further: those that TopK keeps and, where they
    are wanted, the runners-up; all ``[..., k + runners_up]``.

    Attributes:
        positions: Their positions among a token's candidates.
        slots: The positions of their experts among the token's experts.
        offsets: Their positions within their experts.
        indices: Their positions among all latents.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    offsets: torch.Tensor
    indices: torch.Tensor


class RunnersUp(NamedTuple):
    """
    The latents that come next after those that TopK keeps; all ``[..., runners_up]``.

    Attributes:
        coefficients: What would multiply their decoder rows.
        selection: These latents, as ops want them.
    """

    coefficients: torch.Tensor
    selection: Selection


class Encoding(NamedTuple):
    """
    All that encoding a batch computes, compactly.

    Attributes:
        inputs: What router and encoder saw.
        routing: The experts that each token selected, and their gates.
        mean_products: Products of the encoder's input with the mean encoder vector of
            each selected expert, ``[..., experts_per_token]``.
        latents: The latents that survived TopK, and their activations, ``[..., k]``.
        pre_acts: Their pre-activations as TopK ranked them before any gate, ``[..., k]``.
        coefficients: What multiplies their decoder rows, ``[..., k]``: activations, but
            for the decoder norms that rescale_acts_by_decoder_norm puts into these.
        selection: The same latents, as ops want them.
        candidates: Pre-activations of all latents of the selected experts, before any
            norms, ``[..., experts_per_token, expert_size]``; only on request.
        runners_up: The latents next in rank; only on request, and if there are any.
    """

    inputs: Inputs
    routing: Routing
    mean_products: torch.Tensor
    latents: SparseLatents
    pre_acts: torch.Tensor
    coefficients: torch.Tensor
    selection: Selection
    candidates: torch.Tensor | None
    runners_up: RunnersUp | None


class MixtureEncoder(SAE[T_MIXTURE_CONFIG], ABC):
    """
    What of an SAE with experts computes the activations that a batch has.

    :class:`.MixtureSAE` says what its hooks show.
    """

    b_enc: nn.Parameter
    W_router: nn.Parameter
    b_router: nn.Parameter

    def __init__(self, cfg: T_MIXTURE_CONFIG, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self.hook_expert_weights = HookPoint()
        self.hook_expert_indices = HookPoint()
        self._gradient_memory = BufferPool()
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

    def _encode(
        self, x: torch.Tensor, with_candidates: bool = False, runners_up: int = 0
    ) -> Encoding:
        """
        Encode, compactly.

        Args:
            x: Activations of the language model, ``[..., d_in]``.
            with_candidates: Whether to return all candidates. Their gradient makes a
                backward pass as dense as the forward pass.
            runners_up: How many latents to encode beyond those that TopK keeps; as many as
                there are candidates left, at most.
        """
        k = self.cfg.k + runners_up
        inputs = self._process_inputs(x)
        routing = self._route(inputs.x)
        norms = None
        if self.cfg.rescale_acts_by_decoder_norm:
            norms = decoder_norm(self.W_dec)
        # Whoever edits pre-activations may make any of them depend on any other.
        if with_candidates or is_hooked(self.hook_sae_acts_pre):
            products = self._products(inputs.sae_in, routing.indices)
            candidates = self._candidates(products, inputs, routing.indices)
            candidates = self._hook_pre_acts(candidates, routing.indices)
            kept = self._kept(self._topk(candidates, routing, norms, k), routing)
            pre_acts = candidates.flatten(-2).gather(-1, kept.positions)
            selection, means = self._selection(kept.indices), products.mean(dim=-1)
        else:
            candidates = None
            with torch.no_grad():
                products = self._products(inputs.sae_in, routing.indices)
                positions = self._topk_of_products(products, inputs, routing, norms, k)
            kept = self._kept(positions, routing)
            selection = self._selection(kept.indices)
            pre_acts, means = self._kept_pre_acts(
                products, kept, selection, inputs, routing.indices
            )
        gates = routing.weights.to(pre_acts.dtype).gather(-1, kept.slots)
        # ReLU before the gate: -inf * 0 would be NaN.
        coefficients = pre_acts.relu() * gates
        indices, rest = kept.indices, None
        if indices.shape[-1] > self.cfg.k:
            cut = [self.cfg.k, indices.shape[-1] - self.cfg.k]
            coefficients, next_coefficients = coefficients.split(cut, dim=-1)
            indices, next_indices = indices.split(cut, dim=-1)
            rest = RunnersUp(next_coefficients, self._selection(next_indices))
            selection = self._selection(indices)
            pre_acts = pre_acts[..., : self.cfg.k]
        values = coefficients
        if norms is not None:
            values = coefficients * norms[indices]
            pre_acts = pre_acts * norms[indices]
        return Encoding(
            inputs=inputs,
            routing=routing,
            mean_products=means,
            latents=SparseLatents(values, indices),
            pre_acts=pre_acts,
            coefficients=coefficients,
            selection=selection,
            candidates=candidates,
            runners_up=rest,
        )

    def _candidates(
        self,
        products: torch.Tensor,
        inputs: Inputs,
        expert_indices: torch.Tensor,
    ) -> torch.Tensor:
        """Pre-activations of all latents of the selected experts, before any norm."""
        scaled = self._scale(products, inputs, products.mean(dim=-1), expert_indices)
        return scaled + take(self._by_expert(self.b_enc), expert_indices)

    def _topk(
        self,
        pre_acts: torch.Tensor,
        routing: Routing,
        norms: torch.Tensor | None,
        k: int,
    ) -> torch.Tensor:
        with torch.no_grad():
            if norms is not None:
                pre_acts = pre_acts * self._by_expert(norms)[routing.indices]
            return select_topk(
                pre_acts,
                routing.weights.to(pre_acts.dtype),
                k,
                self.cfg.topk_over,
                # Runners-up stand behind the survivors.
                sorted=k > self.cfg.k,
            )

    def _topk_of_products(
        self,
        products: torch.Tensor,
        inputs: Inputs,
        routing: Routing,
        norms: torch.Tensor | None,
        k: int,
    ) -> torch.Tensor:
        """Positions of the kept candidates, of which no more than needed exist at once."""
        batch = products.shape[:-2]
        tokens = batch.numel()
        size = tokens
        if products.device.type == "cpu":
            size = _CANDIDATES_AT_A_TIME // products.shape[-2:].numel()
        parts = [
            t.reshape(tokens, *t.shape[len(batch) :]).split(max(1, size))
            for t in (products, inputs.x, routing.indices, routing.weights)
        ]
        positions = [
            self._topk(
                self._candidates(p, inputs._replace(x=x), indices),
                routing._replace(indices=indices, weights=weights),
                norms,
                k,
            )
            for p, x, indices, weights in zip(*parts, strict=True)
        ]
        return torch.cat(positions).view(*batch, positions[0].shape[-1])

    def _kept(self, positions: torch.Tensor, routing: Routing) -> Kept:
        size = self.cfg.expert_size
        slots, offsets = positions // size, positions % size
        indices = routing.indices.gather(-1, slots) * size + offsets
        return Kept(positions, slots, offsets, indices)

    def _selection(self, indices: torch.Tensor) -> Selection:
        indices = indices.reshape(-1, indices.shape[-1])
        selection = Selection(indices, self.cfg.d_sae, pool=self._gradient_memory)
        if torch.is_grad_enabled() and self.W_dec.requires_grad:
            # Encoder and decoder gradients will both need it.
            return selection.with_order()
        return selection

    def _kept_pre_acts(
        self,
        products: torch.Tensor,
        kept: Kept,
        selection: Selection,
        inputs: Inputs,
        expert_indices: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The kept latents' pre-activations, and all mean products, differentiable."""
        cfg = self.cfg
        kept_products, means = encoder_products(
            inputs.x.reshape(-1, cfg.d_in),
            inputs.center,
            self.W_enc,
            products.flatten(-2)
            .gather(-1, kept.positions)
            .reshape(selection.indices.shape),
            products.mean(dim=-1).reshape(-1, cfg.experts_per_token),
            selection,
            Selection(
                expert_indices.reshape(-1, cfg.experts_per_token), cfg.num_experts
            ),
        )
        means = means.view(expert_indices.shape)
        scaled = self._scale(
            kept_products.view(kept.indices.shape),
            inputs,
            means,
            expert_indices,
            kept.offsets,
            kept.slots,
        )
        return scaled + take(self.b_enc, kept.indices), means

    def _scale(
        self,
        products: torch.Tensor,
        inputs: Inputs,
        mean_products: torch.Tensor,
        expert_indices: torch.Tensor,
        offsets: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Feature scaling of products with encoder vectors.

        Args:
            products: What to scale: products with all latents of the selected experts,
                ``[..., experts_per_token, expert_size]``; or with some latents of each;
                or with any of them, ``[..., n]``.
            inputs: What the encoder sees.
            mean_products: The products with the mean encoder vector of each selected
                expert, ``[..., experts_per_token]``.
            expert_indices: The selected experts, likewise.
            offsets: Which of each expert's latents these are,
                ``[num_experts, latents per expert]``; or, with slots, which latents of
                their experts they are, ``[..., n]``. All if None.
            slots: Which of the token's experts they belong to, ``[..., n]``.
        """
        return products

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
            self.cfg.num_shared_experts,
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
        return self._process_inputs(sae_in).sae_in

    def _process_inputs(self, x: torch.Tensor) -> Inputs:
        x = self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))
        # A last dimension of 1 would broadcast against b_dec without an error.
        if x.shape[-1:] != (self.cfg.d_in,):
            raise ValueError(
                f"the last dimension of x must be d_in={self.cfg.d_in}, "
                f"got shape {tuple(x.shape)}"
            )
        center = self.b_dec
        if not self.cfg.apply_b_dec_to_input:
            center = torch.zeros_like(center)
        return Inputs(self.run_time_activation_norm_fn_in(x), center)

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
        # An expert that an edit selected twice has one place, which has one gradient.
        same = expert_indices.unsqueeze(-1) == expert_indices.unsqueeze(-2)
        repeated = same.tril(-1).any(dim=-1, keepdim=True)
        pre_acts = torch.where(repeated, pre_acts.detach(), pre_acts)
        return wide.scatter_(-2, index, pre_acts).flatten(-2)

    def _by_expert(self, per_latent: torch.Tensor) -> torch.Tensor:
        """Split the last dimension into experts and their latents."""
        return rearrange(per_latent, "... (N n) -> ... N n", N=self.cfg.num_experts)

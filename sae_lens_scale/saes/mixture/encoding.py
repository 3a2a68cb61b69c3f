"""The forward path of a mixture SAE: input, route, products, select, keep."""

from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from einops import rearrange
from sae_lens.saes.sae import SAE
from sae_lens.saes.topk_sae import TopK
from torch import nn
from transformer_lens.hook_points import HookPoint
from typing_extensions import override

from sae_lens_scale.ops import (
    BufferPool,
    SparseLatents,
    SparsityPattern,
    decoder_norm,
    encoder_products,
    grouped_encode,
    lookup,
)

from .config import MixtureSAEConfig, is_integer, require_choice
from .dispatch import Rows
from .extension_points import ConfigTopK, is_hooked, is_overridden, pass_copy
from .feature_scaling import expert_scaling
from .files import require_sizes
from .routing import GATES, Routing, route
from .selection import SELECTIONS, Candidates, Selection
from .stages import AppliedEncoder, Chosen, DecoderInput, Encoding, Inputs

# SAELens's run-time activation normalisation leaves these on the SAE between encode
# and decode.
_RUN_TIME_NORM_STATE = ("x_norm_coeff", "ln_mu", "ln_std")

T_MIXTURE_CONFIG = TypeVar("T_MIXTURE_CONFIG", bound=MixtureSAEConfig)


class MixtureEncoder(SAE[T_MIXTURE_CONFIG], ABC):
    """
    Encoder of a mixture SAE; :class:`.MixtureSAE` describes its hooks.

    Three methods are seams, for subclasses that work otherwise: :meth:`selection` (which
    candidates survive), :meth:`dispatch` (which rows a token has), whose counterpart is
    :meth:`.MixtureSAE.combine`, and :meth:`choose` (how a token's rows are asked for their
    candidates).

    In shapes ``rows`` counts rows (tokens, unless ``dispatch`` is overridden), ``e`` experts
    of a row, ``n`` latents of an expert and ``m`` latents of a row that are kept. Positions
    count a row's candidates, slots its experts, offsets the latents of an expert and indices
    all latents of the SAE.
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

    @override
    def get_activation_fn(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return ConfigTopK(self.cfg)

    @property
    def _k(self) -> int:
        """Number of latents that a token keeps: that of the activation function."""
        topk, cfg = self.activation_fn, self.cfg
        if not isinstance(topk, TopK) or type(topk).forward is not TopK.forward:
            raise ValueError(f"activation_fn must be SAELens's TopK, got {topk}")
        # The config's own TopK would still know a config that was replaced.
        k = cfg.k if isinstance(topk, ConfigTopK) else topk.k
        candidates = cfg.experts_per_token * cfg.expert_size
        if not is_integer(k) or not 1 <= k <= candidates:
            raise ValueError(
                f"k must be an integer from 1 to the {candidates} latents of a token's "
                f"experts, got {k!r}"
            )
        return k

    def selection(self) -> Selection:
        """The rule by which candidates survive; :class:`.Selection` is its contract."""
        return SELECTIONS[require_choice("topk_over", self.cfg.topk_over, SELECTIONS)]

    @property
    def num_held_experts(self) -> int:
        """Number of experts whose weights this SAE holds: all, unless ``dispatch`` is overridden."""
        return self.cfg.num_experts

    def dispatch(self, inputs: Inputs, routing: Routing) -> Rows:
        """
        Bring tokens to the experts that they selected.

        Everything between here and :meth:`.MixtureSAE.combine` sees rows and no tokens:
        products, selection, decoding. Here a row is a token. A subclass may give a token
        several rows, each with some of its experts: its selection then ranks the rows of a
        token together, and its ``combine`` adds up their partial reconstructions. Experts
        of rows are numbered as weights hold them, :attr:`num_held_experts` of them. Rows have
        to be differentiable in ``b_dec``, the gates, and ``x`` if it needs a gradient.

        Args:
            inputs: Input of router and encoder.
            routing: Experts and gates of each token.

        Returns:
            The rows.
        """
        return Rows(
            x=inputs.x.reshape(-1, self.cfg.d_in),
            b_dec=inputs.b_dec,
            experts=routing.indices.reshape(-1, self.cfg.experts_per_token),
            gates=routing.weights.reshape(-1, self.cfg.experts_per_token),
            shape=routing.indices.shape[:-1],
        )

    def _encode(
        self, x: torch.Tensor, runners_up: int = 0, with_all_pre_acts: bool = False
    ) -> Encoding:
        """
        Encode, compactly: input, route, products, select, keep.

        Products with all candidates are computed first, without a gradient, and those of
        the kept latents are then made differentiable. All others have a gradient of zero,
        so nothing is lost, and a backward pass costs as much as the latents that are kept,
        not as all latents of the selected experts.

        Args:
            x: Activations of the language model, ``[..., d_in]``.
            runners_up: Number of latents to encode beyond the survivors; as many as there
                are candidates left, at most.
            with_all_pre_acts: Whether to return the pre-activations of all candidates, with
                a gradient, which makes the backward pass as dense as the forward pass. So does a hook on
                pre-activations, which may make any of them depend on any other.
        """
        cfg = self.cfg
        # Input and route.
        inputs = self._inputs(x)
        routing = self._route(inputs.x)
        rows = self.dispatch(inputs, routing)

        # Products and select.
        W_enc, omega = self._applied_encoder()
        norms = decoder_norm(self.W_dec) if cfg.rescale_acts_by_decoder_norm else None
        encoder = AppliedEncoder(W_enc, omega, norms)
        sizes = (self._k, self._k + runners_up) if runners_up else (self._k,)
        watched = with_all_pre_acts or is_hooked(self.hook_sae_acts_pre)
        all_pre_acts = scaling = None
        if watched:
            candidates, _ = self._candidates(rows, encoder)
            scaling = candidates.scaling
            all_pre_acts = self._hook_pre_acts(candidates.pre_acts(), rows)
            selected = candidates.select(all_pre_acts, self.selection(), sizes)
            pre_acts = all_pre_acts.flatten(1).gather(1, selected.positions)
        else:
            selected, pre_acts, means = self.choose(rows, encoder, sizes)
        slots = selected.positions // cfg.expert_size
        offsets = selected.positions % cfg.expert_size
        indices = rows.experts.gather(1, slots) * cfg.expert_size + offsets
        pattern = self._pattern(indices, selected.mask)

        # Keep.
        if not watched:
            if torch.is_grad_enabled():
                experts = SparsityPattern(rows.experts, self.num_held_experts)
                pre_acts, means = encoder_products(
                    rows.x, rows.b_dec, W_enc, pre_acts, means, pattern, experts
                )
            bias = lookup(self.b_enc, indices)
            if omega is None or means is None:
                pre_acts = pre_acts + bias
            else:
                scaling = expert_scaling(omega, rows.experts, means)
                pre_acts = scaling.apply(pre_acts, bias, slots)
        # ReLU before the gate: -inf * 0 would be NaN.
        gates = rows.gates.to(pre_acts.dtype).gather(1, slots)
        coefficients = pre_acts.relu() * gates
        if selected.mask is not None:
            coefficients = torch.where(selected.mask, coefficients, 0)
        survivors, others = DecoderInput(coefficients, pattern), None
        if any(selected.widths[1:]):
            end = selected.widths[0]
            survivors, others = (
                DecoderInput(
                    coefficients[:, columns],
                    self._pattern(
                        indices[:, columns],
                        None if selected.mask is None else selected.mask[:, columns],
                    ),
                )
                for columns in (slice(end), slice(end, None))
            )
        values, indices = survivors.coefficients, indices[:, : selected.widths[0]]
        pre_acts = pre_acts[:, : indices.shape[1]]
        if norms is not None:
            values, pre_acts = values * norms[indices], pre_acts * norms[indices]
        shape = (*rows.shape, indices.shape[1])
        return Encoding(
            routing=routing,
            rows=rows,
            applied_W_enc=W_enc,
            scaling=scaling,
            all_pre_acts=all_pre_acts,
            latents=SparseLatents(values.view(shape), indices.view(shape)),
            pre_acts=pre_acts.view(shape),
            survivors=survivors,
            runners_up=others,
        )

    @torch.no_grad()
    def choose(
        self, rows: Rows, encoder: AppliedEncoder, sizes: Sequence[int]
    ) -> Chosen:
        """
        Choose the candidates of each row that its token keeps.

        Args:
            rows: The rows.
            encoder: What they are multiplied and ranked with.
            sizes: Numbers of candidates that a token keeps, ascending; see
                :class:`.Selection`.

        Returns:
            The candidates, without a gradient.
        """
        candidates, means = self._candidates(rows, encoder)
        selected = candidates.select_in_parts(self.selection(), sizes)
        products = candidates.products.flatten(1).gather(1, selected.positions)
        return Chosen(selected, products, means)

    def _candidates(
        self, rows: Rows, encoder: AppliedEncoder
    ) -> tuple[Candidates, torch.Tensor | None]:
        """All candidates of rows, and the mean product of each expert, ``[rows, e]``."""
        W_enc, omega, norms = encoder
        products = grouped_encode(
            rows.x - rows.b_dec, W_enc, rows.experts, self.num_held_experts
        )
        means = scaling = None
        if omega is not None:
            means = products.mean(dim=-1)
            scaling = expert_scaling(omega, rows.experts, means)
        candidates = Candidates(
            products,
            rows.experts,
            rows.gates,
            b_enc=self._by_expert(self.b_enc),
            norms=None if norms is None else self._by_expert(norms),
            scaling=scaling,
        )
        return candidates, means

    @override
    def process_sae_in(self, sae_in: torch.Tensor) -> torch.Tensor:
        """
        Input of the encoder. The router reads the same before b_dec is subtracted: where a
        subclass overrides this method, b_dec is added back to its result.
        """
        x, b_dec = self._own_inputs(sae_in)
        return x - b_dec

    def _inputs(self, x: torch.Tensor) -> Inputs:
        if not is_overridden(self, "process_sae_in"):
            return self._own_inputs(x)
        sae_in, b_dec = self.process_sae_in(x), self._subtracted_b_dec()
        return Inputs(sae_in + b_dec, b_dec)

    def _own_inputs(self, x: torch.Tensor) -> Inputs:
        x = self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))
        # A last dimension of 1 would broadcast against b_dec without an error.
        if x.shape[-1:] != (self.cfg.d_in,):
            raise ValueError(
                f"the last dimension of x must be d_in={self.cfg.d_in}, "
                f"got shape {tuple(x.shape)}"
            )
        return Inputs(self.run_time_activation_norm_fn_in(x), self._subtracted_b_dec())

    def _subtracted_b_dec(self) -> torch.Tensor:
        if self.cfg.apply_b_dec_to_input:
            return self.b_dec
        return self.W_enc.new_zeros(self.cfg.d_in)

    def _route(self, router_in: torch.Tensor) -> Routing:
        # Of another config the same weights would be grouped into other experts.
        self._require_sizes({"W_enc": self.W_enc, "W_router": self.W_router})
        self.cfg.require_experts()
        routing = route(
            router_in,
            *self.applied_router(),
            self.cfg.experts_per_token,
            require_choice("gate", self.cfg.gate, GATES),
            self.cfg.num_shared_experts,
        )
        # Indices first: to edit weights, one needs to know whose they are.
        indices = pass_copy(self.hook_expert_indices, routing.indices)
        if is_hooked(self.hook_expert_indices):
            self._require_expert_indices(indices, routing.indices.shape)
        weights = pass_copy(self.hook_expert_weights, routing.weights)
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

    def _require_sizes(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Refuse parameters of other sizes than the config's."""
        require_sizes(self.cfg, tensors)

    def applied_router(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and centre that tokens are routed with, ``[d_in, num_experts]``, ``[d_in]``."""
        return self.W_router, self.b_router

    def _applied_encoder(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Encoder that rows are multiplied with, ``[d_in, d_sae]``, and omega,
        ``[num_experts]``, if the products are scaled afterwards.
        """
        return self.W_enc, None

    def _pattern(
        self, latents: torch.Tensor, mask: torch.Tensor | None
    ) -> SparsityPattern:
        size = self.num_held_experts * self.cfg.expert_size
        if mask is not None:
            # Products of latents that are not kept would cost as much as the others.
            latents = torch.where(mask, latents, size)
        ragged = mask is not None
        pattern = SparsityPattern(latents, size, None, self._gradient_memory, ragged)
        # Encoder and decoder gradients will both need its order.
        has_gradients = torch.is_grad_enabled() and self.W_dec.requires_grad
        return pattern.sorted() if has_gradients else pattern

    def _hook_pre_acts(self, pre_acts: torch.Tensor, rows: Rows) -> torch.Tensor:
        # The d_sae-wide tensor costs more than the whole encoder: only on request.
        if not is_hooked(self.hook_sae_acts_pre):
            return pre_acts
        shape = (*rows.shape, self.cfg.d_sae)
        wide = self.hook_sae_acts_pre(self._to_wide(pre_acts, rows).view(shape))
        # Rows of another batch, or latents in another order, would be taken for these.
        if wide.shape != shape:
            raise ValueError(
                f"hook_sae_acts_pre must keep the shape {shape}, got "
                f"{tuple(wide.shape)}"
            )
        wide = self._by_expert(wide.reshape(-1, self.cfg.d_sae))
        return wide.gather(1, rows.experts.unsqueeze(-1).expand_as(pre_acts))

    def _to_wide(self, pre_acts: torch.Tensor, rows: Rows) -> torch.Tensor:
        """
        Spread candidates over all latents, -inf at other experts'; ``[rows, d_sae]``.

        Raises:
            NotImplementedError: If rows are not tokens, none of which has all of them then.
        """
        cfg, experts = self.cfg, rows.experts
        if is_overridden(self, "dispatch"):
            raise NotImplementedError(
                "pre-activations of all latents cannot be shown where dispatch is overridden"
            )
        wide = pre_acts.new_full(
            (len(pre_acts), cfg.num_experts, cfg.expert_size), -torch.inf
        )
        index = experts.unsqueeze(-1).expand_as(pre_acts)
        # An expert that an edit selected twice has one place, which has one gradient.
        same = experts.unsqueeze(-1) == experts.unsqueeze(-2)
        repeated = same.tril(-1).any(dim=-1, keepdim=True)
        pre_acts = torch.where(repeated, pre_acts.detach(), pre_acts)
        return wide.scatter_(1, index, pre_acts).flatten(1)

    def _by_expert(self, per_latent: torch.Tensor) -> torch.Tensor:
        """Split the last dimension into experts and their latents."""
        return rearrange(per_latent, "... (N n) -> ... N n", n=self.cfg.expert_size)

    @contextmanager
    def _keep_run_time_norm_state(self) -> Iterator[None]:
        """Normalise without a decode; one that is pending stays undisturbed."""
        state = vars(self)
        pending = {name: state[name] for name in _RUN_TIME_NORM_STATE if name in state}
        try:
            yield
        finally:
            for name in _RUN_TIME_NORM_STATE:
                state.pop(name, None)
            state.update(pending)

"""Start of a training SAE from activations, and the pace of its router."""

import warnings
from abc import ABC
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from typing_extensions import override

from .config import MixtureTrainingSAEConfig
from .inference import MixtureSAE
from .initialization import geometric_median, spherical_kmeans

T_MIXTURE_TRAINING_CONFIG = TypeVar(
    "T_MIXTURE_TRAINING_CONFIG", bound=MixtureTrainingSAEConfig
)


def _has_weights(sae: "StartingSAE[Any]", _: Any) -> None:
    sae._is_fresh = False


class StartingSAE(
    MixtureSAE[T_MIXTURE_TRAINING_CONFIG], TrainingSAE[T_MIXTURE_TRAINING_CONFIG], ABC
):
    """
    A training SAE that starts from activations, and whose router learns at its own pace.

    In memory W_router and b_router are divided by ``cfg.router_lr_factor``. Adam changes
    every parameter by about its learning rate, whatever the gradient's size, so the router
    that is applied, and that files hold, changes by that factor times the learning rate.
    ``applied_router`` returns it.
    """

    # Whether the weights are those of __init__ still.
    _is_fresh: bool = False

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self._set_router(self.W_router.data, self.b_router.data)
        self._is_fresh = True
        self.register_load_state_dict_post_hook(_has_weights)

    @override
    def applied_router(self) -> tuple[torch.Tensor, torch.Tensor]:
        factor = self.cfg.router_lr_factor
        # Rounded once, after the product.
        dtype = torch.promote_types(self.dtype, torch.float32)
        return self.W_router.to(dtype) * factor, self.b_router.to(dtype) * factor

    @override
    @torch.no_grad()
    def _set_router(self, W_router: torch.Tensor, b_router: torch.Tensor) -> None:
        factor = self.cfg.router_lr_factor
        super()._set_router(W_router / factor, b_router / factor)

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        for name in ("W_router", "b_router"):
            state_dict[name] = state_dict[name] * self.cfg.router_lr_factor
        super().process_state_dict_for_saving(state_dict)

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        for name in ("W_router", "b_router"):
            state_dict[name] = state_dict[name] / self.cfg.router_lr_factor

    @torch.compiler.disable
    @torch.no_grad()
    def _start_from_first_batch(self, sae_in: torch.Tensor) -> None:
        """
        Start from the first training batch, unless weights were loaded or set before.

        Of fewer tokens than routed experts, each gets an expert, and the others random
        directions; a warning says so.

        Args:
            sae_in: The batch, in the trainer's units.
        """
        wanted, self._is_fresh = self._is_fresh, False
        # A router that was set by hand, or by initialize_from_activations, has a centre.
        if not (wanted and self.cfg.initialize_from_activations) or self.b_router.any():
            return
        with (
            torch.autocast(self.device.type, enabled=False),
            self._keep_run_time_norm_state(),
            # What is drawn after this, such as the order of tokens, is as it would be without.
            torch.random.fork_rng([self.device] if self.device.type == "cuda" else []),
        ):
            x = self.reshape_fn_in(sae_in.to(self.device, torch.float32))
            x = self.run_time_activation_norm_fn_in(x).reshape(-1, self.cfg.d_in)
            _require_finite(x)
            missing = self.cfg.num_experts - self.cfg.num_shared_experts - len(x)
            if missing > 0:
                warnings.warn(
                    f"the first training batch holds {len(x)} tokens: {missing} of the "
                    "experts start from random directions. A larger batch, or "
                    "initialize_from_activations before training, starts all of them "
                    "from activations",
                    stacklevel=2,
                )
            self._start_from(x)

    @torch.no_grad()
    def initialize_from_activations(self, batch: torch.Tensor) -> None:
        """
        Start from activations of your choice; before training.

        With ``cfg.initialize_from_activations``, as by default, a fresh SAE starts from its
        first training batch in the same way, unless this was called.

        b_dec and b_router become the geometric median of the batch. The router's
        columns become the centres of a spherical k-means of the centred batch,
        scaled so that logits have unit spread (those of shared experts, which nobody
        uses, become zeros). Decoder rows keep their random
        directions and the encoder becomes the decoder transposed. An SAE whose decoder
        has another width than d_in keeps b_dec and the encoder.

        SAELens rescales activations before training if ``normalize_activations`` says
        so; the batch is rescaled here in the same way, from its own statistics. Whitening
        it so is refused: whitened coordinates turn with the sample that they are
        estimated from, and the trainer will estimate its own.

        Args:
            batch: Raw activations of the language model, ``[tokens, d_in]`` or with
                more leading dimensions; at least num_experts tokens, without
                special tokens if training excludes them. A few tokens per expert are
                enough.

        Raises:
            ValueError: If the batch has the wrong width, too few tokens, or NaN or
                infinite values, in norms and once normalised too, or if
                normalize_activations is "covariance_whitening".
        """
        if self.cfg.normalize_activations == "covariance_whitening":
            raise ValueError(
                "initialize_from_activations cannot foresee the coordinates of "
                "normalize_activations='covariance_whitening'"
            )
        if batch.shape[-1:] != (self.cfg.d_in,):
            raise ValueError(
                f"the last dimension of batch must be d_in={self.cfg.d_in}, "
                f"got shape {tuple(batch.shape)}"
            )
        raw = batch.reshape(-1, self.cfg.d_in).to(self.device, torch.float32)
        if len(raw) < self.cfg.num_experts:
            raise ValueError(
                f"batch must hold at least num_experts={self.cfg.num_experts} tokens, "
                f"got {len(raw)}"
            )
        _require_finite(raw)
        scaler = ActivationScaler()
        if self.cfg.normalize_activations == "expected_average_only_in":
            scaler.estimate_scaling_factor(self.cfg.d_in, iter([raw]), 1)
        with self._keep_run_time_norm_state():
            x = self.run_time_activation_norm_fn_in(scaler(raw))
        _require_finite(x)
        self._start_from(x)
        self._is_fresh = False

    def _start_from(self, x: torch.Tensor) -> None:
        """Start from activations as router and encoder see them, ``[tokens, d_in]``."""
        shared = self.cfg.num_shared_experts
        median = geometric_median(x)
        centered = x - median
        centers = spherical_kmeans(centered, self.cfg.num_experts - shared)
        logits = centered @ centers.T
        # Bessel's correction would make the spread of a single logit NaN.
        spread = logits.std(correction=min(1, logits.numel() - 1)).clamp(min=1e-8)
        self._set_router(F.pad(centers.T / spread, (shared, 0)), median)
        self.b_enc.data.zero_()
        if self.W_dec.shape[1] == self.cfg.d_in:
            self.b_dec.data.copy_(median)
            self.W_enc.data.copy_(self.W_dec.data.T)


def _require_finite(x: torch.Tensor) -> None:
    if not x.norm(dim=-1).isfinite().all():
        raise ValueError(
            "batch must be finite, in norms and once normalised too, got NaN or "
            "infinite values"
        )

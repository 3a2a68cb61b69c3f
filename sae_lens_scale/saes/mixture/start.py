"""Start of a training SAE from activations, and the pace of its router."""

import json
from abc import ABC
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors import SafetensorError
from safetensors.torch import load_file
from typing_extensions import override

from sae_lens_scale.upstream import _disable_hooks

from .config import MixtureTrainingSAEConfig
from .extension_points import is_overridden
from .files import require_tensors
from .inference import MixtureSAE
from .initialization import geometric_median, spherical_kmeans

T_MIXTURE_TRAINING_CONFIG = TypeVar(
    "T_MIXTURE_TRAINING_CONFIG", bound=MixtureTrainingSAEConfig
)

_ROUTER = ("W_router", "b_router")
# Clusters of too few tokens fit these and no others: of 4 per expert, held-out tokens had a mean
# cosine of 0.66 with their centre, of 50 one of 0.73, of 200 one of 0.74 (255 experts).
_TOKENS_PER_EXPERT = 50
# The most bounds clustering, whose time and memory are proportional to tokens and experts.
_LEAST_TOKENS, _MOST_TOKENS = 12_800, 65_536


class StartingSAE(
    MixtureSAE[T_MIXTURE_TRAINING_CONFIG], TrainingSAE[T_MIXTURE_TRAINING_CONFIG], ABC
):
    """
    A training SAE that starts from activations, and whose router learns at its own pace.

    The parameters W_router and b_router are those that are applied divided by
    ``cfg.router_lr_factor``. Adam changes every parameter by about its learning rate,
    whatever the gradient's size, so the applied router changes by that factor times the
    learning rate. ``applied_router``, state dicts and files hold what is applied.
    """

    # W_router as __init__ made it; None once the router has been set.
    _fresh_router: torch.Tensor | None
    # Whether training batches still decide the start. A compiled step depends on this alone:
    # it would be compiled anew for each length of a list.
    _is_starting: bool
    # The batches so far, as the router sees them; none once the start is over.
    _first_batches: list[torch.Tensor]

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        # A change of the config later on must not change the router.
        self._router_lr_factor = self.cfg.router_lr_factor
        self.W_router.data /= self._router_lr_factor
        # No buffer, which copies of the SAE, such as averaged ones, would miss once it is gone.
        self._fresh_router = self.W_router.data.clone()
        self._is_starting, self._first_batches = True, []

    @override
    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        # To other devices and dtypes along with the parameters.
        if self._fresh_router is not None:
            self._fresh_router = fn(self._fresh_router)
        return super()._apply(fn, *args, **kwargs)

    @override
    def _require_valid_config(self) -> None:
        super()._require_valid_config()
        if self.cfg.router_lr_factor != self._router_lr_factor:
            raise ValueError(
                f"router_lr_factor must be {self._router_lr_factor}, as when the SAE was "
                f"made, got {self.cfg.router_lr_factor}"
            )

    @override
    def applied_router(self) -> tuple[torch.Tensor, torch.Tensor]:
        factor = self._router_lr_factor
        # Rounded once, after the product.
        dtype = torch.promote_types(self.W_router.dtype, torch.float32)
        return self.W_router.to(dtype) * factor, self.b_router.to(dtype) * factor

    @override
    def set_router(self, W_router: torch.Tensor, b_router: torch.Tensor) -> None:
        self._write_router(W_router, b_router)
        # Batches in other units (folds), or other activations, would undo it.
        self._end_start()

    def _write_router(self, W_router: torch.Tensor, b_router: torch.Tensor) -> None:
        super().set_router(self._as_parameter(W_router), self._as_parameter(b_router))

    def _as_parameter(self, applied: torch.Tensor) -> torch.Tensor:
        """The value of a router's parameter, given what is applied."""
        dtype = torch.promote_types(applied.dtype, torch.float32)
        value = (applied.to(dtype) / self._router_lr_factor).to(self.W_router.dtype)
        # The other dtypes reach much further.
        if value.dtype == torch.float16 and (value.isinf() & applied.isfinite()).any():
            raise ValueError(
                "float16 is too small for the router divided by router_lr_factor="
                f"{self._router_lr_factor}: use bfloat16 or float32, or a larger factor"
            )
        return value

    @override
    def _save_to_state_dict(
        self, destination: Any, prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _ROUTER:
            # One that torch parametrizes or prunes is no entry.
            if (parameter := destination.get(prefix + name)) is not None:
                # Not in place: the entries share memory with the parameters.
                destination[prefix + name] = parameter * self._router_lr_factor

    @override
    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        for name in _ROUTER:
            if (applied := state_dict.get(prefix + name)) is not None:
                state_dict[prefix + name] = self._as_parameter(applied)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if any(prefix + name in state_dict for name in _ROUTER):
            self._end_start()

    @override
    def load_weights_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        """
        Load a training checkpoint's weights, all of them or none.

        Args:
            checkpoint_path: Folder of the checkpoint.

        Raises:
            FileNotFoundError: If it has no weights.
            ValueError: If they are damaged, or another SAE's; names the file and,
                where it can be read, the tensors.
        """
        weights = Path(checkpoint_path) / SAE_WEIGHTS_FILENAME
        self._require_router_lr_factor_of(Path(checkpoint_path) / SAE_CFG_FILENAME)
        try:
            state_dict = load_file(weights)
            # All tensors are required: those that an export lacks would get start values.
            require_tensors(self.cfg, state_dict, self._shapes())
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{weights} cannot be loaded: {error}") from error
        self.process_state_dict_for_loading(state_dict)
        self.load_state_dict(state_dict)

    def _require_router_lr_factor_of(self, path: Path) -> None:
        """Refuse a checkpoint of another factor: its optimizer state is in other units."""
        if not path.exists():
            return
        # Version 0.1.0 had no such field.
        saved = json.loads(path.read_text()).get("router_lr_factor", 1.0)
        if saved != self._router_lr_factor:
            raise ValueError(
                f"router_lr_factor must be {saved}, as in the checkpoint's {path}, got "
                f"{self._router_lr_factor}"
            )

    @torch.compiler.disable()
    @torch.no_grad()
    def _start_from_first_batches(self, sae_in: torch.Tensor) -> None:
        """
        Start from the first training batches, unless the router was loaded or set before.

        The router starts from clusters of the first batch. With the 2nd, 4th, 8th, … these
        become clusters of all batches so far, until those hold enough tokens; of more than
        enough, the first count. b_dec starts from the first batch, unless it was set before.
        Where there are fewer tokens than routed experts, the other experts get random
        directions. Weights that are loaded, and set_router, end the start. A step without
        gradients, which measures the loss of held-out activations, has no part in it.

        Args:
            sae_in: A batch, in the trainer's units.

        Raises:
            ValueError: If the batch has the wrong width, or NaN or infinite values; the start
                then goes on with the next one.
        """
        if not sae_in.numel():
            # Fails later, for its loss.
            return
        is_first = not self._first_batches
        if not self.cfg.initialize_from_activations or (
            is_first and not self._is_fresh()
        ):
            self._end_start()
            return
        # Hooks see the step itself, once.
        with _disable_hooks(self), self._keep_run_time_norm_state():
            x = self._inputs(sae_in).x.reshape(-1, self.cfg.d_in)[:_MOST_TOKENS]
        # Copied: a view would keep the trainer's whole buffer in memory.
        x = x.to(torch.float32, copy=True)
        _require_finite(x)
        batches = [*self._first_batches, x]
        num_routed = self.cfg.num_experts - self.cfg.num_shared_experts
        enough = min(max(_LEAST_TOKENS, _TOKENS_PER_EXPERT * num_routed), _MOST_TOKENS)
        is_last = sum(map(len, batches)) >= enough
        if is_last or len(batches).bit_count() == 1:
            tokens = torch.cat([batch.to(x.device) for batch in batches])
            median = self._start_router(tokens[:_MOST_TOKENS], go_on=not is_first)
            if is_first and self._reconstructs_its_input() and not self.b_dec.any():
                self.b_dec.data.copy_(median)
        self._first_batches = batches
        if is_last:
            self._end_start()

    def _end_start(self) -> None:
        self._fresh_router = None
        self._is_starting, self._first_batches = False, []

    def _is_fresh(self) -> bool:
        """Say whether the router is as __init__ made it."""
        fresh = self._fresh_router
        return fresh is not None and bool(
            torch.equal(self.W_router, fresh) and not self.b_router.any()
        )

    def _reconstructs_its_input(self) -> bool:
        same_width = self.W_dec.shape[1] == self.cfg.d_in
        return same_width and not is_overridden(self, "target")

    @torch.no_grad()
    def initialize_from_activations(self, batch: torch.Tensor) -> None:
        """
        Start from activations of your choice; before training.

        With ``cfg.initialize_from_activations``, as by default, a fresh SAE starts from its
        first training batches (docs/train.md), unless this was called.

        b_dec and b_router become the geometric median of the batch. The router's
        columns become the centres of a spherical k-means of the centred batch,
        scaled so that logits have unit spread (those of shared experts, which nobody
        uses, become zeros). Decoder rows keep their random
        directions and the encoder becomes the decoder transposed. An SAE that reconstructs
        something else than its input (``target``) keeps b_dec and the encoder.

        SAELens rescales activations before training if ``normalize_activations`` says
        so; the batch is rescaled here in the same way, from its own statistics. Whitening
        it so is refused: whitened coordinates turn with the sample that they are
        estimated from, and the trainer will estimate its own.

        Args:
            batch: Raw activations of the language model, ``[tokens, d_in]`` or with
                more leading dimensions; at least num_experts tokens, without
                special tokens if training excludes them. Fifty tokens per expert are
                enough.

        Raises:
            ValueError: If the batch has the wrong width, too few tokens, zeros alone that
                would have to be rescaled, or NaN or infinite values, in norms and once
                normalised in the SAE's dtype too, or if normalize_activations is
                "covariance_whitening".
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
            if not raw.norm(dim=-1).any():
                raise ValueError(
                    "batch must not be zero everywhere with normalize_activations="
                    "'expected_average_only_in', which divides by its mean norm"
                )
            scaler.estimate_scaling_factor(self.cfg.d_in, iter([raw]), 1)
        with self._keep_run_time_norm_state():
            # In the dtype in which training will see it: float16 holds no large numbers.
            x = self.run_time_activation_norm_fn_in(scaler(raw).to(self.dtype))
        x = x.to(torch.float32)
        _require_finite(x)
        median = self._start_router(x)
        if self._reconstructs_its_input():
            self.b_dec.data.copy_(median)
            self.b_enc.data.zero_()
            self.W_enc.data.copy_(self.W_dec.data.T)
        self._end_start()

    def _start_router(self, x: torch.Tensor, go_on: bool = False) -> torch.Tensor:
        """
        Start the router from activations as it sees them.

        Args:
            x: The activations, ``[tokens, d_in]``.
            go_on: Whether clustering goes on from the router's columns, instead of beginning
                with points of ``x``, so that experts keep most of their tokens.

        Returns:
            The geometric median of ``x``, ``[d_in]``.
        """
        num_shared, centers = self.cfg.num_shared_experts, None
        if go_on:
            W_router, _ = self.applied_router()
            centers = F.normalize(W_router[:, num_shared:].T.to(x.dtype), dim=-1)
        # Its own randomness: the order of later batches, which another thread may be drawing,
        # stays as it is without a start.
        generator = torch.Generator(x.device).manual_seed(torch.initial_seed())
        with torch.autocast(x.device.type, enabled=False):
            median = geometric_median(x)
            centered = x - median
            centers = spherical_kmeans(
                centered,
                self.cfg.num_experts - num_shared,
                generator=generator,
                centers=centers,
            )
            logits = centered @ centers.T
        # Bessel's correction would make the spread of a single logit NaN.
        spread = logits.std(correction=min(1, logits.numel() - 1))
        # Equal tokens have none but that of rounding.
        spread = spread.clamp(min=1e-3 * x.norm(dim=-1).mean() + 1e-8)
        self._write_router(F.pad(centers.T / spread, (num_shared, 0)), median)
        return median


def _require_finite(x: torch.Tensor) -> None:
    if not x.norm(dim=-1).isfinite().all():
        raise ValueError(
            "batch must be finite, in norms and once normalised in the SAE's dtype too, "
            "got NaN or infinite values"
        )

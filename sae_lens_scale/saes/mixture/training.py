"""What Scale SAE and Switch SAE share, for training."""

import sys
from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import (
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors import SafetensorError
from safetensors.torch import load_file
from typing_extensions import override

from sae_lens_scale.files import replacing_files
from sae_lens_scale.ops import (
    decoder_norm,
    grouped_encode,
    select_latents,
    sparse_decode,
    take,
)
from sae_lens_scale.saes.mixture.dead_latents import dead_latent_loss, dead_offsets
from sae_lens_scale.saes.mixture.initialization import (
    geometric_median,
    spherical_kmeans,
)
from sae_lens_scale.saes.mixture.routing import load_balance_loss, routed_load

from .config import MixtureSAEConfig
from .encoding import Encoding, is_hooked
from .files import require_tensors
from .inference import MixtureSAE

# Of Gao et al. 2024, section 5.3.1.
MULTI_TOPK_FACTOR = 4


@dataclass
class MixtureTrainingSAEConfig(MixtureSAEConfig, TrainingSAEConfig, ABC):
    """
    Fields that the training configs of all mixture-of-experts SAEs share.

    Args:
        use_sparse_activations (bool): Whether a training step keeps feature
            activations as a sparse tensor.
        load_balance_coefficient (float): Weight alpha of the load-balancing loss.
        aux_loss_coefficient (float): Weight of the dead-latent loss.
        multi_topk_coefficient (float): Weight of the Multi-TopK loss.
    """

    rescale_acts_by_decoder_norm: bool = True
    use_sparse_activations: bool = True
    load_balance_coefficient: float = 0.03
    # Gao et al.'s value; 1, as in SAELens's TopK, measured worse (docs/defaults.md).
    aux_loss_coefficient: float = 1 / 32
    multi_topk_coefficient: float = 0.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "load_balance_coefficient",
            "aux_loss_coefficient",
            "multi_topk_coefficient",
        ):
            value = getattr(self, name)
            if not _is_finite_number(value) or value < 0:
                raise ValueError(
                    f"{name} must be a finite number of at least 0, got {value!r}"
                )
        norm = self.decoder_init_norm
        if norm is not None and (not _is_finite_number(norm) or norm <= 0):
            raise ValueError(
                f"decoder_init_norm must be a finite number above 0 or None, got {norm!r}"
            )
        if self.normalize_activations in ("layer_norm", "constant_norm_rescale"):
            for name in ("aux_loss_coefficient", "multi_topk_coefficient"):
                if value := getattr(self, name):
                    raise ValueError(
                        f"{name} must be 0 with normalize_activations="
                        f"{self.normalize_activations!r}, got {value}: what is decoded in "
                        "normalised space would meet errors in the original one"
                    )

    @override
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> Any:
        # An inference export lacks the fields that only training has, but its metadata
        # keeps them: training that goes on from it goes on as it was.
        metadata = config_dict.get("metadata") or {}
        if metadata.get("training_architecture") == cls.architecture():
            details = metadata.get("training_architecture_details") or {}
            config_dict = {**details, **config_dict}
        return super().from_dict(config_dict)


def _is_finite_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # False for NaN and for huge integers.


# As TrainStepOutput types them.
Metrics: TypeAlias = dict[
    str, torch.Tensor | float | int | Callable[[], torch.Tensor | float | int]
]

T_MIXTURE_TRAINING_CONFIG = TypeVar(
    "T_MIXTURE_TRAINING_CONFIG", bound=MixtureTrainingSAEConfig
)


class MixtureTrainingSAE(
    MixtureSAE[T_MIXTURE_TRAINING_CONFIG], TrainingSAE[T_MIXTURE_TRAINING_CONFIG], ABC
):
    """Training of a mixture-of-experts SAE."""

    # Each routed expert's share of the selections in the last step that was logged.
    _logged_load: torch.Tensor | None = None

    @override
    def encode_with_hidden_pre(
        self, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Feature activations and the pre-activations that TopK ranked.

        Args:
            x: Activations of the language model, ``[..., d_in]``.

        Returns:
            Both ``[..., d_sae]``; pre-activations are -inf at latents whose expert
            was not selected.
        """
        feature_acts, hidden_pre, _ = self._encode_widely(x)
        return feature_acts, hidden_pre

    def _encode_widely(
        self, x: torch.Tensor, runners_up: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, Encoding]:
        encoding = self._encode(x, with_candidates=True, runners_up=runners_up)
        candidates, experts = encoding.candidates, encoding.routing.indices
        assert candidates is not None
        if self.cfg.rescale_acts_by_decoder_norm:
            candidates = candidates * self._by_expert(decoder_norm(self.W_dec))[experts]
        feature_acts = encoding.latents.to_dense(self.cfg.d_sae)
        hidden_pre = self._to_wide(candidates, experts)
        return self.hook_sae_acts_post(feature_acts), hidden_pre, encoding

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """
        One training step's forward pass and losses.

        Args:
            step_input: The batch, ``sae_in`` of shape ``[tokens, d_in]``.

        Returns:
            ``feature_acts`` and ``hidden_pre`` are those of
            :meth:`encode_with_hidden_pre`. With ``use_sparse_activations``, unless
            ``hook_sae_acts_post`` is hooked, ``feature_acts`` is a sparse COO tensor and
            ``hidden_pre`` holds the surviving latents only, ``[tokens, k]``.

        Raises:
            ValueError: If the loss is not finite. One such step would turn every
                weight into NaN, without an error.
        """
        # Hooks are written for dense activations.
        if self.cfg.use_sparse_activations and not is_hooked(self.hook_sae_acts_post):
            encoding = self._encode(step_input.sae_in, runners_up=self._num_runners_up)
            feature_acts = encoding.latents.to_coo(self.cfg.d_sae)
            hidden_pre = encoding.pre_acts
            sae_out = self._decode_encoding(encoding)
        else:
            feature_acts, hidden_pre, encoding = self._encode_widely(
                step_input.sae_in, self._num_runners_up
            )
            sae_out = self.decode(feature_acts)
        mse_loss = self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()
        losses = {"mse_loss": mse_loss}
        losses |= self.calculate_aux_loss(
            step_input, feature_acts, hidden_pre, sae_out, encoding=encoding
        )
        loss = torch.stack(list(losses.values())).sum()
        if not loss.isfinite():
            values = ", ".join(f"{n} {v.item()}" for n, v in losses.items())
            raise ValueError(
                f"the loss is not finite at training step "
                f"{step_input.n_training_steps} ({values}): sae_in, of shape "
                f"{tuple(step_input.sae_in.shape)}, or the weights hold NaN or infinite "
                "values, or the batch is empty"
            )
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            loss=loss,
            losses=losses,
            metrics=self._metrics(step_input, encoding)
            if step_input.is_logging_step
            else {},
        )

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
        *,
        encoding: Encoding | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        The losses beside the reconstruction's, by name, already weighted.

        Args:
            step_input: The batch, ``sae_in`` of shape ``[tokens, d_in]``.
            feature_acts: Not needed; for subclasses.
            hidden_pre: Not needed; for subclasses.
            sae_out: Reconstruction of the batch, ``[tokens, d_in]``.
            encoding: What encoding the batch computed, routing included; computed anew
                if not given. A training step gives it, so overrides must accept it
                (``**kwargs`` will do).

        Returns:
            Scalars, each of them part of the loss.
        """
        if encoding is None:
            with self._keep_run_time_norm_state():
                encoding = self._encode(
                    step_input.sae_in, runners_up=self._num_runners_up
                )
        cfg = self.cfg
        losses: dict[str, torch.Tensor] = {}
        if cfg.load_balance_coefficient:
            balance = load_balance_loss(
                encoding.routing, cfg.num_experts, cfg.num_shared_experts
            )
            losses["load_balance_loss"] = (
                cfg.load_balance_coefficient * cfg.d_in * balance
            )
        if cfg.aux_loss_coefficient:
            losses["auxiliary_reconstruction_loss"] = (
                cfg.aux_loss_coefficient
                * self._dead_latent_loss(step_input, encoding, sae_out)
            )
        if cfg.multi_topk_coefficient:
            losses["multi_topk_loss"] = (
                cfg.multi_topk_coefficient
                * self._multi_topk_loss(step_input, encoding, sae_out)
            )
        return losses

    @property
    def _num_runners_up(self) -> int:
        """How many latents beyond k a training step needs."""
        if not self.cfg.multi_topk_coefficient:
            return 0
        return (MULTI_TOPK_FACTOR - 1) * self.cfg.k

    def _multi_topk_loss(
        self, step_input: TrainStepInput, encoding: Encoding, sae_out: torch.Tensor
    ) -> torch.Tensor:
        """The squared error of a TopK that keeps several times as many latents."""
        cfg = self.cfg
        candidates = cfg.experts_per_token * cfg.expert_size
        assert encoding.runners_up is not None or cfg.k == candidates
        if encoding.runners_up is not None:
            coefficients, selection = encoding.runners_up
            recons = sparse_decode(
                coefficients.reshape(selection.indices.shape), self.W_dec, selection
            )
            sae_out = sae_out + recons.view_as(sae_out)
        return self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()

    def _dead_latent_loss(
        self, step_input: TrainStepInput, encoding: Encoding, sae_out: torch.Tensor
    ) -> torch.Tensor:
        dead = step_input.dead_neuron_mask
        if dead is None or not dead.any():
            return sae_out.new_zeros(())
        cfg, inputs, routing = self.cfg, encoding.inputs, encoding.routing
        experts = routing.indices
        # Only what is dead is computed, as if experts were made of nothing else.
        offsets, is_dead = dead_offsets(dead, cfg.num_experts)
        first = torch.arange(cfg.num_experts, device=dead.device) * cfg.expert_size
        latents = first.unsqueeze(-1) + offsets
        if encoding.candidates is None:
            W_enc = select_latents(
                self.W_enc, 1, latents.flatten(), self._gradient_memory
            )
            # As in route: the center's gradient from a term that is zero.
            center = inputs.center.detach()
            products = grouped_encode(
                (inputs.x - center).reshape(-1, cfg.d_in),
                W_enc,
                experts.reshape(-1, cfg.experts_per_token),
                cfg.num_experts,
            ).view(*experts.shape, offsets.shape[-1])
            shift = (center - inputs.center) @ W_enc
            products = products + take(shift.view_as(latents), experts)
            scaled = self._scale(
                products, inputs, encoding.mean_products, experts, offsets
            )
            pre_acts = scaled + take(take(self.b_enc, latents), experts)
        else:
            pre_acts = encoding.candidates.gather(-1, offsets[experts])
        norms = None
        if cfg.rescale_acts_by_decoder_norm:
            norms = decoder_norm(self.W_dec.detach())[latents][experts].flatten(0, -3)
        return dead_latent_loss(
            pre_acts.flatten(0, -3),
            norms,
            is_dead[experts].flatten(0, -3),
            routing.weights.reshape(-1, cfg.experts_per_token).to(pre_acts.dtype),
            experts.reshape(-1, cfg.experts_per_token),
            (step_input.sae_in - sae_out).detach().reshape(-1, cfg.d_in),
            select_latents(self.W_dec, 0, latents.flatten(), self._gradient_memory),
            cfg.num_experts,
        )

    @torch.no_grad()
    def _metrics(self, step_input: TrainStepInput, encoding: Encoding) -> Metrics:
        """Diagnostics for the logger; docs/architectures.md says what they are."""
        num_experts = self.cfg.num_experts
        load = routed_load(
            encoding.routing.indices, num_experts, self.cfg.num_shared_experts
        )
        self._logged_load = load
        metrics: Metrics = {
            "router/max_load": load.max() * len(load),
            "router/idle_experts": (load == 0).sum(),
            "router/load_entropy": torch.special.entr(load).sum(),
        }
        dead = step_input.dead_neuron_mask
        if dead is not None:
            metrics["router/dead_experts"] = dead.view(num_experts, -1).all(-1).sum()
        return metrics

    @override
    def process_state_dict_for_saving_inference(
        self, state_dict: dict[str, Any]
    ) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        if self.cfg.rescale_acts_by_decoder_norm:
            norms = decoder_norm(self.W_dec.detach())
            state_dict["W_enc"] = state_dict["W_enc"] * norms
            state_dict["b_enc"] = state_dict["b_enc"] * norms
            state_dict["W_dec"] = state_dict["W_dec"] / norms.unsqueeze(-1)

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        """
        Save weights and config for inference, as carefully as :meth:`save_model`.

        Args:
            path: Folder, made if it is missing.

        Returns:
            Paths of the weights and of the config.
        """
        with replacing_files(path) as temporary:
            weights, cfg = super().save_inference_model(temporary)
        return Path(path) / weights.name, Path(path) / cfg.name

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
        try:
            state_dict = load_file(weights)
            # Exactly its own: what an export lacks would be made up otherwise.
            require_tensors(self.cfg, state_dict, self._shapes())
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{weights} cannot be loaded: {error}") from error
        self.process_state_dict_for_loading(state_dict)
        self.load_state_dict(state_dict)

    @override
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        norms = self.W_router.detach().float().norm(dim=0).cpu().numpy()
        histograms = {**super().log_histograms(), "weights/W_router_norms": norms}
        if self._logged_load is not None:
            histograms["router/load"] = self._logged_load.cpu().numpy()
        return histograms

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {}

    @torch.no_grad()
    def initialize_from_activations(self, batch: torch.Tensor) -> None:
        """
        Start from the activations instead of from constants; before training.

        b_dec and b_router become the geometric median of the batch. The router's
        columns become the centres of a spherical k-means of the centred batch,
        scaled so that logits have unit spread (those of shared experts, which nobody
        uses, become zeros). Decoder rows keep their random
        directions and the encoder becomes the decoder transposed.

        SAELens rescales activations before training if ``normalize_activations`` says
        so; the batch is rescaled here in the same way, from its own statistics. Whitening
        it so is refused: whitened coordinates turn with the sample that they are
        estimated from, and the trainer will estimate its own.

        Args:
            batch: Raw activations of the language model, ``[tokens, d_in]`` or with
                more leading dimensions; at least num_experts tokens, without
                special tokens if training excludes them. A few hundred tokens per
                expert are enough.

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
        x = self._normalize_like_the_trainer(raw)
        if not all(t.norm(dim=-1).isfinite().all() for t in (raw, x)):
            raise ValueError(
                "batch must be finite, in norms and once normalised too, got NaN or "
                "infinite values"
            )
        median = geometric_median(x)
        self.b_dec.data.copy_(median)
        self.b_router.data.copy_(median)
        shared = self.cfg.num_shared_experts
        centers = spherical_kmeans(x - median, self.cfg.num_experts - shared)
        logits = (x - median) @ centers.T
        # Bessel's correction would make the spread of a single logit NaN.
        spread = logits.std(correction=min(1, logits.numel() - 1)).clamp(min=1e-8)
        self.W_router.data.copy_(F.pad(centers.T / spread, (shared, 0)))
        self.b_enc.data.zero_()
        self.W_enc.data.copy_(self.W_dec.data.T)

    def _normalize_like_the_trainer(self, x: torch.Tensor) -> torch.Tensor:
        scaler = ActivationScaler()
        if self.cfg.normalize_activations == "expected_average_only_in":
            scaler.estimate_scaling_factor(self.cfg.d_in, iter([x]), 1)
        with self._keep_run_time_norm_state():
            return self.run_time_activation_norm_fn_in(scaler(x))

"""
Scale SAE: several experts per token, and amplified encoder deviations.

Xu et al., "Beyond Redundancy: Diverse and Specialized Multi-Expert Sparse
Autoencoder"; the authors' code is https://github.com/shahinxu/Scale-Sparse-Autoencoder.
"""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from numpy.typing import NDArray
from sae_lens.saes.sae import TrainStepInput
from torch import nn
from typing_extensions import override

from .mixture.config import (
    MixtureSAEConfig,
    MixtureTrainingSAEConfig,
    require_choice,
)
from .mixture.feature_scaling import DECOMPOSITIONS, DecompositionName, scaled_encoder
from .mixture.inference import MixtureSAE
from .mixture.routing import GateName
from .mixture.selection import TopKOver
from .mixture.stages import Encoding
from .mixture.training import Metrics, MixtureTrainingSAE


@dataclass
class ScaleSAEConfig(MixtureSAEConfig):
    """
    Configuration class for ScaleSAE inference.

    Args:
        num_experts (int): Number of experts (N); divides d_sae.
        experts_per_token (int): Number of experts that each token selects (e).
        num_shared_experts (int): Number of these that are the same for all tokens: the
            first experts, with gate 1. The router chooses the others. Not in the paper.
        k (int): Number of latents kept per token, over all its experts together; at
            most experts_per_token * d_sae / num_experts.
        gate (GateName): Multiplier of a selected expert's activations: an entry of
            :data:`.GATES`. With one expert per token, all but "softmax" are 1, and a router
            whose gates are 1 learns from load balancing only.
        topk_over (TopKOver): Selection of the latents that survive: an entry of
            :data:`.SELECTIONS`.
        rescale_acts_by_decoder_norm (bool): Whether to treat the decoder as if its rows
            had unit norm, by moving their norms into the activations before TopK.
            Requires that the SAE was trained this way.
        d_in (int): Input dimension (dimensionality of the activations being encoded).
            Inherited from SAEConfig.
        d_sae (int): SAE latent dimension (number of latents over all experts).
            Inherited from SAEConfig.
        dtype (str): Data type for the SAE parameters. Inherited from SAEConfig.
        device (str): Device to place the SAE on. Inherited from SAEConfig.
        apply_b_dec_to_input (bool): Whether to subtract the decoder bias from the
            encoder's input. Inherited from SAEConfig.
        normalize_activations (Literal["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm", "covariance_whitening"]):
            Normalization strategy for input activations. Inherited from SAEConfig.
        reshape_activations (Literal["none", "hook_z"]): How to reshape activations
            (useful for attention head outputs). Inherited from SAEConfig.
        metadata (SAEMetadata): Metadata about the SAE (model name, hook name, etc.).
            Inherited from SAEConfig.
    """

    num_experts: int = 64
    experts_per_token: int = 2
    num_shared_experts: int = 0
    gate: GateName = "rescaled"
    topk_over: TopKOver = "gated_activations"

    @override
    @classmethod
    def architecture(cls) -> str:
        return "scale"


class ScaleSAE(MixtureSAE[ScaleSAEConfig]):
    """
    An inference-only SAE whose router selects several experts per token.

    Feature scaling is part of training only: W_enc is the scaled encoder, and the
    learned omegas are in ``cfg.metadata.omega``. Training that goes on from an export
    starts omega at 0 again, so that it records what it added.

    Parameters: W_enc ``[d_in, d_sae]``, b_enc ``[d_sae]``, W_dec ``[d_sae, d_in]``,
    b_dec ``[d_in]``, W_router ``[d_in, num_experts]``, b_router ``[d_in]``. Latent j
    belongs to expert ``j // (d_sae / num_experts)``.
    """

    @override
    def _shapes_to_load(self, state_dict: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        shapes = super()._shapes_to_load(state_dict)
        if has_feature_scaling(state_dict):
            shapes["omega"] = (self.cfg.num_experts,)
            details = self.cfg.metadata.training_architecture_details or {}
            if details.get("decomposition") == "learned":
                shapes["W_low_pass"] = (self.cfg.d_in, self.cfg.d_in)
        return shapes

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        omega = state_dict.pop("omega", None)
        W_low_pass = state_dict.pop("W_low_pass", None)
        if omega is None:
            return
        # A training checkpoint, which keeps omega apart and says how it was applied.
        details = self.cfg.metadata.training_architecture_details or {}
        decomposition = require_choice(
            "metadata.training_architecture_details['decomposition']",
            details.get("decomposition"),
            DECOMPOSITIONS,
        )
        record_omega(self.cfg, omega)
        W_enc = state_dict["W_enc"]
        # Folded in float32 at least, as an export is.
        dtype = torch.promote_types(W_enc.dtype, torch.float32)
        state_dict["W_enc"] = scaled_encoder(
            W_enc.to(dtype),
            omega.to(dtype),
            decomposition,
            None if W_low_pass is None else W_low_pass.to(dtype),
        ).to(W_enc.dtype)


def has_feature_scaling(state_dict: dict[str, Any]) -> bool:
    """Tell a training checkpoint's weights from an export's, in which omega is folded."""
    return "omega" in state_dict or "W_low_pass" in state_dict


def record_omega(cfg: MixtureSAEConfig, omega: torch.Tensor) -> None:
    """Keep omegas in the metadata for study; once folded, those on record stay."""
    if omega.any() or "omega" not in cfg.metadata:
        cfg.metadata.omega = omega.tolist()


def default_experts_per_token(num_experts: int) -> int:
    """Number of experts that a token selects unless it is given: one in 32, two at least."""
    return min(num_experts, max(2, num_experts // 32))


@dataclass
class ScaleTrainingSAEConfig(MixtureTrainingSAEConfig):
    """
    Configuration class for training a ScaleTrainingSAE.

    Args:
        num_experts (int): Number of experts (N); divides d_sae.
        experts_per_token (int): Number of experts that each token selects (e). None, as by
            default, is one in 32 of num_experts, but two at least.
        num_shared_experts (int): Number of these that are the same for all tokens: the
            first experts, with gate 1. The router chooses the others. Not in the paper.
            None, as by default, is an eighth of experts_per_token, rounded down.
        k (int): Number of latents kept per token, over all its experts together; at
            most experts_per_token * d_sae / num_experts.
        gate (GateName): Multiplier of a selected expert's activations: an entry of
            :data:`.GATES`. With one expert per token, all but "softmax" are 1, and a router
            whose gates are 1 learns from load balancing only.
        topk_over (TopKOver): Selection of the latents that survive: an entry of
            :data:`.SELECTIONS`.
        feature_scaling (bool): Whether to learn how strongly each expert's encoder weights
            deviate from their low-pass part (equation 2.5).
        decomposition (DecompositionName): The low-pass part of an expert's encoder
            weights: an entry of :data:`.DECOMPOSITIONS`. The paper's method is "mean"; the
            others are ablations of its Appendix C, and train more slowly.
        rescale_acts_by_decoder_norm (bool): Treat the decoder as if its rows had unit
            norm, by moving their norms into the activations before TopK. Decoder norms
            drift during training and would otherwise sway which latents are selected.
        use_sparse_activations (bool): Whether a training step keeps feature activations
            as a sparse tensor instead of a d_sae-wide dense one. Results are equal;
            encode returns dense activations either way.
        load_balance_coefficient (float): Weight alpha of the load-balancing loss, which
            is alpha * d_in * num_experts * sum(f_i * P_i). 0 turns it off.
        aux_loss_coefficient (float): Weight of the dead-latent loss, in which latents
            that stopped firing reconstruct what the others left unexplained. 0 turns it
            off.
        multi_topk_coefficient (float): Weight of the Multi-TopK loss (Gao et al. 2024,
            section 5.3.1, where it is 1/8), the squared error of a TopK that keeps 4 k
            latents, or as many as there are. More latents learn from each token. 0 turns it
            off.
        initialize_from_activations (bool): Whether a fresh SAE starts from its first
            training batches (docs/train.md). Weights that are loaded, and a router that
            set_router set, stay. Turn it off for a random router.
        router_lr_factor (float): Learning rate of the router, as a multiple of the rest's.
            The parameters W_router and b_router hold the router divided by it; files,
            state dicts and applied_router() hold the router itself.
        decoder_init_norm (float | None): Norm of the decoder rows at the start of
            training. Use None to disable. Inherited from TrainingSAEConfig.
        d_in (int): Input dimension (dimensionality of the activations being encoded).
            Inherited from SAEConfig.
        d_sae (int): SAE latent dimension (number of latents over all experts).
            Inherited from SAEConfig.
        dtype (str): Data type for the SAE parameters. Inherited from SAEConfig.
        device (str): Device to place the SAE on. Inherited from SAEConfig.
        apply_b_dec_to_input (bool): Whether to subtract the decoder bias from the
            encoder's input. Inherited from SAEConfig.
        normalize_activations (Literal["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm", "covariance_whitening"]):
            Normalization strategy for input activations. Inherited from SAEConfig.
        reshape_activations (Literal["none", "hook_z"]): How to reshape activations
            (useful for attention head outputs). Inherited from SAEConfig.
        metadata (SAEMetadata): Metadata about the SAE (model name, hook name, etc.).
            Inherited from SAEConfig.
    """

    num_experts: int = 256
    experts_per_token: int = None  # type: ignore[assignment]
    num_shared_experts: int = None  # type: ignore[assignment]
    gate: GateName = "rescaled"
    topk_over: TopKOver = "gated_activations"
    feature_scaling: bool = True
    decomposition: DecompositionName = "mean"

    @override
    def validate(self) -> None:
        # Numpy's integers are welcome; what is no integer is refused by name, with all else.
        N = self.num_experts if isinstance(self.num_experts, Integral) else 1
        if self.experts_per_token is None:
            self.experts_per_token = default_experts_per_token(int(N))
        e = (
            self.experts_per_token
            if isinstance(self.experts_per_token, Integral)
            else 1
        )
        if self.num_shared_experts is None:
            self.num_shared_experts = e // 8
        super().validate()
        require_choice("decomposition", self.decomposition, DECOMPOSITIONS)

    @override
    @classmethod
    def architecture(cls) -> str:
        return "scale"


class ScaleTrainingSAE(MixtureTrainingSAE[ScaleTrainingSAEConfig]):
    """
    Scale SAE with training functionality.

    With ``feature_scaling`` it has a parameter omega ``[num_experts]`` beside those of
    :class:`ScaleSAE`, and with the "learned" decomposition W_low_pass
    ``[d_in, d_in]``, which maps each expert's mean to its low-pass part.
    """

    omega: nn.Parameter | None
    W_low_pass: nn.Parameter | None

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        cfg = self.cfg
        like: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        omega = W_low_pass = None
        if cfg.feature_scaling:
            omega = nn.Parameter(torch.zeros(cfg.num_experts, **like))
            if cfg.decomposition == "learned":
                W_low_pass = nn.Parameter(torch.eye(cfg.d_in, **like))
        self.register_parameter("omega", omega)
        self.register_parameter("W_low_pass", W_low_pass)

    @override
    def _require_valid_config(self) -> None:
        super()._require_valid_config()
        self._require_feature_scaling()

    def _require_feature_scaling(self) -> None:
        """Refuse a config that asks for parameters which this SAE lacks, or lacks its own."""
        cfg = self.cfg
        require_choice("decomposition", cfg.decomposition, DECOMPOSITIONS)
        learned = cfg.feature_scaling and cfg.decomposition == "learned"
        for name, wanted in (("omega", cfg.feature_scaling), ("W_low_pass", learned)):
            if wanted != (getattr(self, name) is not None):
                raise ValueError(
                    f"feature_scaling={cfg.feature_scaling} with decomposition="
                    f"{cfg.decomposition!r} needs an SAE with{'' if wanted else 'out'} "
                    f"{name}: build it with this config"
                )

    @override
    def _applied_encoder(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        self._require_feature_scaling()
        if self.omega is None or self.cfg.decomposition == "mean":
            return self.W_enc, self.omega
        # The decompositions of Appendix C are for comparison: written out, not fast.
        return self._scaled_encoder(self.omega), None

    def _scaled_encoder(self, omega: torch.Tensor) -> torch.Tensor:
        return scaled_encoder(
            self.W_enc, omega, self.cfg.decomposition, self.W_low_pass
        )

    @torch.no_grad()
    def effective_W_enc(self) -> torch.Tensor:
        """The encoder that is applied, omega included, ``[d_in, d_sae]``."""
        self._require_feature_scaling()
        if self.omega is None:
            return self.W_enc.detach()
        return self._scaled_encoder(self.omega)

    @override
    @torch.no_grad()
    def _fold_encoder(self) -> None:
        if self.omega is not None:
            record_omega(self.cfg, self._of_all_experts(self.omega))
            self.W_enc.data.copy_(self.effective_W_enc())
            self.omega.data.zero_()

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        if self.cfg.decomposition == "identity":
            # Only low-pass parts made of W_enc itself scale along with it.
            self._fold_encoder()
        super().fold_activation_norm_scaling_factor(scaling_factor)

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        if self.omega is not None:
            record_omega(self.cfg, self.omega)

    @override
    def process_state_dict_for_saving_inference(
        self, state_dict: dict[str, Any]
    ) -> None:
        state_dict["W_enc"] = self.effective_W_enc()
        state_dict.pop("omega", None)
        state_dict.pop("W_low_pass", None)
        super().process_state_dict_for_saving_inference(state_dict)

    @override
    def _shapes_to_load(self, state_dict: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        shapes = super()._shapes_to_load(state_dict)
        if not has_feature_scaling(state_dict):
            shapes.pop("omega", None)
            shapes.pop("W_low_pass", None)
        return shapes

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        # An inference export has its omegas folded into W_enc: scaling starts anew.
        for name, start in (("omega", torch.zeros), ("W_low_pass", torch.eye)):
            if getattr(self, name) is not None and name not in state_dict:
                state_dict[name] = start(
                    len(getattr(self, name)),
                    dtype=state_dict["W_enc"].dtype,
                    device=state_dict["W_enc"].device,
                )

    @override
    @torch.no_grad()
    def _metrics(self, step_input: TrainStepInput, encoding: Encoding) -> Metrics:
        metrics = super()._metrics(step_input, encoding)
        if self.omega is not None:
            omega = self._of_all_experts(self.omega)
            metrics["omega/mean"] = omega.mean()
            metrics["omega/min"] = omega.min()
            metrics["omega/max"] = omega.max()
        return metrics

    @override
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        histograms = super().log_histograms()
        if self.omega is not None:
            omega = self._of_all_experts(self.omega.detach())
            histograms["weights/omega"] = omega.float().cpu().numpy()
        return histograms

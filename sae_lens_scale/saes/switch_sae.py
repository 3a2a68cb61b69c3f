"""
Switch SAE: one expert per token.

Mudide et al., "Efficient Dictionary Learning with Switch Sparse Autoencoders"
(https://arxiv.org/abs/2410.08201).
"""

from dataclasses import dataclass

from typing_extensions import override

from .mixture.config import MixtureSAEConfig, MixtureTrainingSAEConfig
from .mixture.inference import MixtureSAE
from .mixture.routing import GateName
from .mixture.training import MixtureTrainingSAE


@dataclass
class SwitchSAEConfig(MixtureSAEConfig):
    """
    Configuration class for SwitchSAE inference.

    Args:
        num_experts (int): Number of experts (N); divides d_sae.
        k (int): Number of latents kept per token; at most d_sae / num_experts.
        gate (GateName): Multiplier of the selected expert's activations: an entry of
            :data:`.GATES`. For one expert all but "softmax" are 1, and a router whose gates
            are 1 learns from load balancing only.
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

    @override
    @classmethod
    def architecture(cls) -> str:
        return "switch"


class SwitchSAE(MixtureSAE[SwitchSAEConfig]):
    """
    An inference-only SAE whose router selects one expert per token.

    Parameters: W_enc ``[d_in, d_sae]``, b_enc ``[d_sae]``, W_dec ``[d_sae, d_in]``,
    b_dec ``[d_in]``, W_router ``[d_in, num_experts]``, b_router ``[d_in]``. Latent j
    belongs to expert ``j // (d_sae / num_experts)``.
    """


@dataclass
class SwitchTrainingSAEConfig(MixtureTrainingSAEConfig):
    """
    Configuration class for training a SwitchTrainingSAE.

    Args:
        num_experts (int): Number of experts (N); divides d_sae.
        k (int): Number of latents kept per token; at most d_sae / num_experts.
        gate (GateName): Multiplier of the selected expert's activations: an entry of
            :data:`.GATES`. For one expert all but "softmax" are 1, and a router whose gates
            are 1 learns from load balancing only.
        topk_over (TopKOver): Selection of the latents that survive: an entry of
            :data:`.SELECTIONS`.
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

    gate: GateName = "uniform"
    # Its gates are 1, and so its router learns from load balancing only.
    router_lr_factor: float = 1 / 64

    @override
    @classmethod
    def architecture(cls) -> str:
        return "switch"


class SwitchTrainingSAE(MixtureTrainingSAE[SwitchTrainingSAEConfig]):
    """Switch SAE with training functionality."""

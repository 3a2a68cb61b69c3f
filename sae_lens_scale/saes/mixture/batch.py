"""The batch of a training step, of which an SAE may be given a part."""

from abc import ABC

import torch
from sae_lens.saes.sae import TrainStepInput

from .routing import Routing, expert_load
from .start import T_MIXTURE_TRAINING_CONFIG, StartingSAE


class BatchSAE(StartingSAE[T_MIXTURE_TRAINING_CONFIG], ABC):
    """
    Means over a batch, as losses need them.

    Its methods are seams, for an SAE that is given some of the batch's tokens, or that holds
    some of the experts.
    """

    def batch_mean(self, values: torch.Tensor) -> torch.Tensor:
        """
        Mean over the tokens of the batch.

        Args:
            values: A value for each token, or several, ``[tokens, ...]``.

        Returns:
            ``[...]``; of a part of the batch, its share of the mean.
        """
        return values.mean(dim=0)

    def batch_load(self, routing: Routing, dtype: torch.dtype) -> torch.Tensor:
        """
        Share of the batch's selections that each expert got that is not shared.

        Args:
            routing: Routing of the tokens that the SAE was given.
            dtype: Dtype of the result.

        Returns:
            ``[num_routed_experts]``, of the whole batch; sums to 1.
        """
        cfg = self.cfg
        return expert_load(
            routing.indices, cfg.num_experts, cfg.num_shared_experts, dtype
        )

    def _require_finite(
        self, losses: dict[str, torch.Tensor], step_input: TrainStepInput
    ) -> None:
        """
        Refuse losses that are not finite: one such step would turn every weight into NaN.

        Raises:
            ValueError: If one is not.
        """
        if not torch.stack(list(losses.values())).sum().isfinite():
            values = ", ".join(f"{n} {v.item()}" for n, v in losses.items())
            raise ValueError(
                f"the loss is not finite at training step "
                f"{step_input.n_training_steps} ({values}): sae_in, of shape "
                f"{tuple(step_input.sae_in.shape)}, or the weights hold NaN or infinite "
                f"values, or ones too large for {self.dtype}, or the batch is empty"
            )

    def _held(self, per_expert: torch.Tensor) -> torch.Tensor:
        """Values of the experts whose weights this SAE holds, given those of all."""
        return per_expert

    def _of_all_experts(self, held: torch.Tensor) -> torch.Tensor:
        """Values of all experts, given those of the experts whose weights this SAE holds."""
        return held

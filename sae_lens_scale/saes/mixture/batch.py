"""The batch of a training step, of which an SAE may be given a part."""

from abc import ABC
from typing import Any, NamedTuple

import torch
from sae_lens.saes.sae import TrainStepInput
from typing_extensions import override

from sae_lens_scale.ops import HostNumber

from .routing import Routing, expert_load
from .start import T_MIXTURE_TRAINING_CONFIG, StartingSAE


class StepLosses(NamedTuple):
    """
    The losses of a training step.

    Attributes:
        is_finite: Whether they all are.
        losses: The losses, by name.
        step: Number of the step.
        shape: Shape of the batch.
        dtype: Dtype of the weights.
    """

    is_finite: HostNumber
    losses: dict[str, torch.Tensor]
    step: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def require_finite(self) -> None:
        """
        Refuse losses that are not finite.

        Raises:
            ValueError: If one is not; names all of them.
        """
        if not self.is_finite.read():
            values = ", ".join(f"{n} {v.item()}" for n, v in self.losses.items())
            raise ValueError(
                f"the loss is not finite at training step {self.step} ({values}): sae_in, "
                f"of shape {self.shape}, or the weights hold NaN or infinite values, or ones "
                f"too large for {self.dtype}, or the batch is empty"
            )


class BatchSAE(StartingSAE[T_MIXTURE_TRAINING_CONFIG], ABC):
    """
    Means over a batch, as losses need them.

    Its methods are seams, for an SAE that is given some of the batch's tokens, or that holds
    some of the experts.
    """

    # The losses of the last step, where they are still on their way.
    _last_step: "StepLosses | None" = None

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

        On a GPU, whose queue the host would empty, those of the step before: its weights are
        NaN by now, but no file is written of them.

        Raises:
            ValueError: If one is not.
        """
        self._require_finite_step()
        step = StepLosses(
            is_finite=HostNumber(torch.stack(list(losses.values())).sum().isfinite()),
            losses={name: loss.detach() for name, loss in losses.items()},
            step=step_input.n_training_steps,
            shape=tuple(step_input.sae_in.shape),
            dtype=self.dtype,
        )
        # Without a gradient no weight will change: whoever measures a loss can wait.
        if step.is_finite.has_arrived() or not torch.is_grad_enabled():
            step.require_finite()
        else:
            self._last_step = step

    def _require_finite_step(self) -> None:
        """Refuse to go on, or to save, after a step whose losses were not finite."""
        if self._last_step is not None:
            self._last_step.require_finite()

    @override
    def _save_to_state_dict(self, *args: Any) -> None:
        self._require_finite_step()
        super()._save_to_state_dict(*args)

    @override
    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._last_step = None

    def _held(self, per_expert: torch.Tensor) -> torch.Tensor:
        """Values of the experts whose weights this SAE holds, given those of all."""
        return per_expert

    def _of_all_experts(self, held: torch.Tensor) -> torch.Tensor:
        """Values of all experts, given those of the experts whose weights this SAE holds."""
        return held

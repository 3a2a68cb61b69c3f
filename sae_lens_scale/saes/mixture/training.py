"""Mixture SAE for training: the base of Scale SAE and Switch SAE in training."""

from abc import ABC
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from numpy.typing import NDArray
from sae_lens.saes.sae import (
    TrainCoefficientConfig,
    TrainStepInput,
    TrainStepOutput,
)
from typing_extensions import override

from sae_lens_scale.files import replacing_files
from sae_lens_scale.ops import decoder_norm
from sae_lens_scale.upstream import _disable_hooks

from .dead_latents import DeadLatents, dead_by_expert, dead_latent_loss
from .extension_points import is_hooked, is_overridden
from .learning import LearningRecons, LearningSAE
from .routing import load_balance_loss
from .stages import Encoding
from .start import T_MIXTURE_TRAINING_CONFIG

# As TrainStepOutput types them.
Metrics: TypeAlias = dict[
    str, torch.Tensor | float | int | Callable[[], torch.Tensor | float | int]
]


class LossInput(NamedTuple):
    """
    Input of the losses of a batch.

    Attributes:
        sae_in: The batch, ``[tokens, d_in]``.
        encoding: Its encoding.
        dead: The dead latents; None if no loss asks for them.
        recons: Reconstructions by all latents that learn.
    """

    sae_in: torch.Tensor
    encoding: Encoding
    dead: DeadLatents | None
    recons: LearningRecons


class MixtureTrainingSAE(LearningSAE[T_MIXTURE_TRAINING_CONFIG], ABC):
    """Training of a mixture-of-experts SAE."""

    # Each routed expert's share of the selections in the last step that was logged.
    _logged_load: torch.Tensor | None = None
    # Input of the losses that are being computed.
    _current: LossInput | None = None

    def target(self, step_input: TrainStepInput) -> torch.Tensor:
        """
        The activations that the SAE learns to reconstruct; a seam.

        All losses that compare with an input compare with this. Its width is that of W_dec
        and b_dec, which a subclass may make another than d_in (a transcoder's, say) where
        ``apply_b_dec_to_input`` is off. The error term needs width d_in, and
        what starts from activations is the router alone.

        Args:
            step_input: The batch, ``sae_in`` of shape ``[tokens, d_in]``.

        Returns:
            ``[tokens, d_out]``; here ``sae_in``.
        """
        return step_input.sae_in

    @override
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        if is_overridden(self, "encode_with_hidden_pre"):
            return self.encode_with_hidden_pre(x)[0]
        return super().encode(x)

    @override
    def _encodes_compactly(self) -> bool:
        return super()._encodes_compactly() and not is_overridden(
            self, "encode_with_hidden_pre"
        )

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
        return self._hidden_pre_of(self._encode(x, with_all_pre_acts=True))

    def _hidden_pre_of(self, encoding: Encoding) -> tuple[torch.Tensor, torch.Tensor]:
        """The result of encode_with_hidden_pre."""
        hidden_pre, experts = encoding.all_pre_acts, encoding.rows.experts
        assert hidden_pre is not None
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * self._by_expert(decoder_norm(self.W_dec))[experts]
        feature_acts = self._feature_acts(encoding)
        hidden_pre = self._to_wide(hidden_pre, encoding.rows)
        return self.hook_sae_acts_post(feature_acts), hidden_pre.view_as(feature_acts)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """
        One training step's forward pass and losses.

        Args:
            step_input: The batch, ``sae_in`` of shape ``[tokens, d_in]``.

        Returns:
            ``feature_acts`` and ``hidden_pre`` are those of
            :meth:`encode_with_hidden_pre`. With ``use_sparse_activations``, unless that or
            ``decode`` is overridden or ``hook_sae_acts_post`` is hooked, ``feature_acts`` is
            a sparse COO tensor and ``hidden_pre`` holds the surviving latents only,
            ``[tokens, k]``.

        Raises:
            ValueError: If the loss is not finite, or the batch of an SAE that is starting. On
                a GPU a loss that has a gradient is looked at by the next step, or when the
                SAE is saved.
        """
        x = step_input.sae_in
        dead = self._find_dead(step_input.dead_neuron_mask)
        if self._is_starting and torch.is_grad_enabled():
            self._start_from_first_batches(x)
        if is_overridden(self, "encode_with_hidden_pre"):
            feature_acts, hidden_pre = self.encode_with_hidden_pre(x)
            sae_out = self.decode(feature_acts)
            # The losses need an encoding of ours; hooks have seen the subclass's.
            with _disable_hooks(self), self._keep_run_time_norm_state():
                encoding = self._encode(x, self._num_runners_up)
            recons = self._learning_recons(encoding, dead)
        elif (
            not self.cfg.use_sparse_activations
            or is_hooked(self.hook_sae_acts_post)
            or is_overridden(self, "decode")
        ):
            encoding = self._encode(x, self._num_runners_up, with_all_pre_acts=True)
            feature_acts, hidden_pre = self._hidden_pre_of(encoding)
            sae_out = self.decode(feature_acts)
            recons = self._learning_recons(encoding, dead)
        else:
            encoding = self._encode(x, self._num_runners_up)
            feature_acts = encoding.latents.to_coo(
                self.num_held_experts * self.cfg.expert_size
            )
            hidden_pre = encoding.pre_acts
            recons = self._learning_recons(encoding, dead, encoding.survivors)
            assert recons.survivors is not None
            sae_out = self._finish_decoding(recons.survivors)
        errors = self.mse_loss_fn(sae_out, self.target(step_input))
        losses = {"mse_loss": self.batch_mean(errors.sum(dim=-1).flatten())}
        with self._losses_of(LossInput(x, encoding, dead, recons)):
            losses |= self.calculate_aux_loss(
                step_input, feature_acts, hidden_pre, sae_out
            )
        metrics = (
            self._metrics(step_input, encoding) if step_input.is_logging_step else {}
        )
        self._require_finite(losses, step_input)
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
            metrics=metrics,
        )

    @contextmanager
    def _losses_of(self, current: LossInput) -> Iterator[None]:
        """Give losses, whose signatures are SAELens's, what they need besides."""
        outer, self._current = self._current, current
        try:
            yield
        finally:
            # Kept any longer, it would keep the graph alive.
            self._current = outer

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """
        The losses beside the reconstruction's, by name, already weighted.

        Args:
            step_input: The batch, ``sae_in`` of shape ``[tokens, d_in]``.
            feature_acts: Not needed; for subclasses.
            hidden_pre: Not needed; for subclasses.
            sae_out: Reconstruction of the batch, ``[tokens, d_out]``.

        Returns:
            Scalars, each of them part of the loss.
        """
        cfg, sae_in = self.cfg, step_input.sae_in
        current = self._current
        if current is None or current.sae_in is not sae_in:
            dead = self._find_dead(step_input.dead_neuron_mask)
            with self._keep_run_time_norm_state():
                encoding = self._encode(sae_in, self._num_runners_up)
            recons = self._learning_recons(encoding, dead)
            current = LossInput(sae_in, encoding, dead, recons)
        _, encoding, _, recons = current
        losses: dict[str, torch.Tensor] = {}
        if cfg.load_balance_coefficient:
            p = encoding.routing.probabilities.reshape(-1, cfg.num_experts)
            p = self.batch_mean(p)[cfg.num_shared_experts :]
            balance = load_balance_loss(self.batch_load(encoding.routing, p.dtype), p)
            losses["load_balance_loss"] = (
                cfg.load_balance_coefficient * cfg.d_in * balance
            )
        if cfg.aux_loss_coefficient:
            with self._losses_of(current):
                losses["auxiliary_reconstruction_loss"] = self.calculate_topk_aux_loss(
                    sae_in=self.target(step_input),
                    sae_out=sae_out,
                    hidden_pre=hidden_pre,
                    dead_neuron_mask=step_input.dead_neuron_mask,
                )
        if cfg.multi_topk_coefficient:
            wider = sae_out
            if recons.runners_up is not None:
                wider = sae_out + recons.runners_up
            errors = self.mse_loss_fn(wider, self.target(step_input))
            losses["multi_topk_loss"] = cfg.multi_topk_coefficient * self.batch_mean(
                errors.sum(dim=-1).flatten()
            )
        return losses

    def calculate_topk_aux_loss(
        self,
        sae_in: torch.Tensor,
        sae_out: torch.Tensor,
        hidden_pre: torch.Tensor,
        dead_neuron_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        The dead-latent loss, weighted; see :mod:`.dead_latents`. Name and arguments are
        those of SAELens's TopK SAE.

        Args:
            sae_in: The input, or the target if that differs, ``[tokens, d_out]``.
            sae_out: Its reconstruction, likewise.
            hidden_pre: Not needed; for subclasses.
            dead_neuron_mask: True at dead latents, ``[d_sae]``; None if there are none.

        Returns:
            A scalar.

        Raises:
            ValueError: If the mask is not of these latents, or if it is called on its own,
                not by calculate_aux_loss, by an SAE whose target is another than its input.
        """
        cfg, current = self.cfg, self._current
        dead = None if current is None else current.dead
        if current is None or dead is None or dead.mask is not dead_neuron_mask:
            # Of another mask than the step's.
            dead = self._find_dead(dead_neuron_mask)
            if dead is None or not dead.most.read():
                return sae_out.new_zeros(())
            if current is not None:
                encoding = current.encoding
            elif is_overridden(self, "target"):
                raise ValueError(
                    "calculate_topk_aux_loss needs the encoding of the SAE's input: "
                    "call calculate_aux_loss instead"
                )
            else:
                with self._keep_run_time_norm_state():
                    encoding = self._encode(sae_in)
            alone = encoding._replace(runners_up=None)
            recons = self._learning_recons(alone, dead).dead
        else:
            encoding, recons = current.encoding, current.recons.dead
        if recons is None:
            return sae_out.new_zeros(())
        residual = (sae_in - sae_out).detach().reshape(-1, sae_out.shape[-1])
        experts = encoding.routing.indices.reshape(-1, cfg.experts_per_token)
        num_dead = dead.by_expert.sum(dim=-1)[experts].sum(dim=-1)
        recons = recons.reshape(residual.shape)
        errors = dead_latent_loss(recons, residual, num_dead, self._most_dead)
        return cfg.aux_loss_coefficient * self.batch_mean(errors)

    @torch.no_grad()
    def _metrics(self, step_input: TrainStepInput, encoding: Encoding) -> Metrics:
        """Diagnostics for the logger; docs/architectures.md says what they are."""
        num_experts, expert_size = self.cfg.num_experts, self.cfg.expert_size
        load = self.batch_load(encoding.routing, torch.float32)
        self._logged_load = load
        metrics: Metrics = {
            "router/max_load": load.max() * len(load),
            "router/idle_experts": (load == 0).sum(),
            "router/load_entropy": torch.special.entr(load).sum(),
        }
        mask = step_input.dead_neuron_mask
        if mask is not None:
            dead = dead_by_expert(mask, num_experts, expert_size)
            metrics["router/dead_experts"] = dead.all(-1).sum()
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

        Raises:
            ValueError: As :meth:`save_model`.
        """
        self._require_valid_config()
        with replacing_files(path) as temporary:
            weights, cfg = super().save_inference_model(temporary)
        return Path(path) / weights.name, Path(path) / cfg.name

    @override
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        norms = self.applied_router()[0].detach().norm(dim=0).cpu().numpy()
        histograms = {**super().log_histograms(), "weights/W_router_norms": norms}
        if self._logged_load is not None:
            histograms["router/load"] = self._logged_load.cpu().numpy()
        return histograms

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {}

"""Mixture SAE for inference: the base of Scale SAE and Switch SAE."""

import math
from abc import ABC
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.topk_sae import TopK
from torch import nn
from typing_extensions import override

from sae_lens_scale.files import replacing_files
from sae_lens_scale.ops import (
    BufferPool,
    SparseLatents,
    decode_dense,
    decoder_norm,
    sparse_decode,
)
from sae_lens_scale.upstream import _disable_hooks

from .dispatch import Rows
from .encoding import T_MIXTURE_CONFIG, MixtureEncoder
from .extension_points import is_hooked, is_overridden
from .files import require_tensors
from .routing import Routing
from .stages import DecoderInput, Encoding


class MixtureSAE(MixtureEncoder[T_MIXTURE_CONFIG], ABC):
    """
    An SAE whose latents are divided among experts that a router selects.

    ``hook_expert_weights`` and ``hook_expert_indices`` show, and may edit, the gates
    and indices of the selected experts, both ``[..., experts_per_token]``. An expert
    that an edit selects twice counts twice: its latents take two of the k places each,
    and what they have in both adds up.
    ``hook_sae_acts_pre`` is d_sae wide, as in any SAE of SAELens; latents whose
    expert was not selected have no pre-activation and show -inf.
    """

    @override
    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """
        Set a parameter, as an assignment does.

        Args:
            name: Its name.
            param: The parameter.

        Raises:
            ValueError: If it has other sizes than the config's, such as those of some
                latents only: TopK ranks them with all others of their experts.
        """
        if param is not None:
            self._require_sizes({name: param})
        super().register_parameter(name, param)

    @override
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """
        Feature activations, gates included.

        Args:
            x: Activations of the language model, ``[..., d_in]``.

        Returns:
            ``[..., d_sae]``, at most k of them non-zero.

        Raises:
            ValueError: If the last dimension of ``x`` is not d_in.
        """
        return self.hook_sae_acts_post(self._feature_acts(self._encode(x)))

    def encode_sparse(self, x: torch.Tensor) -> SparseLatents:
        """
        Feature activations as :meth:`encode` returns them, compactly: nothing d_sae wide is
        made, unless a hook or a subclass asks for it.

        Args:
            x: Activations of the language model, ``[..., d_in]``.

        Returns:
            The latents of each token and their activations, both ``[..., m]``: m is k, or,
            where a hook turns others on, as many as any token has. Some activations may be
            0. A latent that is there twice, because a hook selected its expert twice,
            counts twice.

        Raises:
            ValueError: If the last dimension of ``x`` is not d_in.
        """
        if self._encodes_compactly() and not is_overridden(self, "dispatch"):
            return self._encode(x).latents
        acts = self.encode(x)
        width = int(acts.count_nonzero(dim=-1).amax()) if acts.numel() else 0
        indices = acts.abs().topk(width).indices
        return SparseLatents(acts.gather(-1, indices), indices)

    def _feature_acts(self, encoding: Encoding) -> torch.Tensor:
        """Feature activations of each token, ``[..., d_sae]``."""
        acts = encoding.latents.to_dense(self.cfg.d_sae)
        acts = self.combine(acts.view(-1, self.cfg.d_sae), encoding.rows)
        return acts.view(*encoding.routing.indices.shape[:-1], self.cfg.d_sae)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Reconstruct, without d_sae-wide activations unless somebody hooks them.

        Args:
            x: Activations of the language model, ``[..., d_in]``.

        Returns:
            The reconstruction, ``[..., d_out]``, as a rule in the shape of ``x``; with
            ``use_error_term`` ``x`` itself, and the effect of what hooks edit.
        """
        sae_out = self._reconstruct(x)
        if self.use_error_term:
            with torch.no_grad():
                with _disable_hooks(self):
                    clean = self._reconstruct(x)
                error = self.hook_sae_error(x - clean)
            sae_out = sae_out + error
        return self.hook_sae_output(sae_out)

    def _reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        if not self._encodes_compactly() or is_overridden(self, "decode"):
            return self.decode(self.encode(x))
        encoding = self._encode(x)
        partial = self._partial_recons(encoding.survivors)
        (recons,) = self._recons_of(encoding, [partial])
        return self._finish_decoding(recons)

    def _encodes_compactly(self) -> bool:
        """Say whether encode returns what ``_encode`` finds: no hook or override changes it."""
        return not (is_hooked(self.hook_sae_acts_post) or is_overridden(self, "encode"))

    @override
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """
        Reconstruction from feature activations; linear in them, up to normalisation.

        Args:
            feature_acts: ``[..., d_sae]``, dense or sparse.

        Returns:
            ``[..., d_in]``.

        Raises:
            ValueError: If the last dimension of ``feature_acts`` is not d_sae.
        """
        # Norms would stretch a last dimension of 1 to d_sae without an error.
        if feature_acts.shape[-1:] != (self.cfg.d_sae,):
            raise ValueError(
                f"the last dimension of feature_acts must be d_sae={self.cfg.d_sae}, "
                f"got shape {tuple(feature_acts.shape)}"
            )
        if feature_acts.layout != torch.strided:
            feature_acts = feature_acts.to_dense()
        recons = self._decode_dense(feature_acts.reshape(-1, self.cfg.d_sae))
        return self._finish_decoding(
            recons.view(*feature_acts.shape[:-1], recons.shape[-1])
        )

    def _decode_dense(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """Sum of the latents' decoder rows, without bias, ``[tokens, d_out]``."""
        dtype = torch.promote_types(feature_acts.dtype, self.W_dec.dtype)
        if self.cfg.rescale_acts_by_decoder_norm:
            if dtype == torch.float16:
                # Divided by a tiny norm, a steered activation may be infinite there.
                feature_acts = feature_acts.float()
            feature_acts = feature_acts * (1 / decoder_norm(self.W_dec))
        return decode_dense(feature_acts, self.W_dec).to(dtype)

    def combine(self, partial: torch.Tensor, rows: Rows) -> torch.Tensor:
        """
        Add up the results of each token's rows; the counterpart of ``dispatch``.

        It gets partial reconstructions, feature activations or counts, always of all rows,
        and has to be differentiable.

        Args:
            partial: A result for each row, ``[rows, width]``.
            rows: The rows, as ``dispatch`` returned them.

        Returns:
            Sums over the rows of each token, ``[tokens, width]``; in one process, where a
            row is a token, ``partial`` itself.
        """
        return partial

    def _combine_together(
        self, partial: Sequence[torch.Tensor], rows: Rows
    ) -> Sequence[torch.Tensor]:
        """Combine several results, of any widths."""
        return [self.combine(p, rows) for p in partial]

    def _partial_recons(self, latents: DecoderInput) -> torch.Tensor:
        """Sum of the latents' decoder rows, without bias, ``[rows, d_out]``."""
        return sparse_decode(latents.coefficients, self.W_dec, latents.pattern)

    def _recons_of(
        self, encoding: Encoding, partial: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Reconstructions ``[..., d_out]``, from those of rows, ``[rows, d_out]``."""
        shape = encoding.routing.indices.shape[:-1]
        combined = self._combine_together(partial, encoding.rows)
        return [recons.view(*shape, recons.shape[-1]) for recons in combined]

    def _finish_decoding(self, recons: torch.Tensor) -> torch.Tensor:
        recons = self.hook_sae_recons(recons + self.b_dec)
        recons = self.run_time_activation_norm_fn_out(recons)
        return self.reshape_fn_out(recons, self.d_head)

    def route(self, x: torch.Tensor) -> Routing:
        """
        Find the experts that each token selects, for analysis.

        Args:
            x: Activations of the language model, ``[..., d_in]``.

        Returns:
            Gates, indices and probabilities; fires the hooks that encode fires.

        Raises:
            ValueError: If the last dimension of ``x`` is not d_in.
        """
        with self._keep_run_time_norm_state():
            return self._route(self._inputs(x).x)

    @override
    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # A pool of the old device or dtype would never be used again.
        self._gradient_memory = BufferPool()
        return super()._apply(*args, **kwargs)

    @torch.no_grad()
    def set_router(self, W_router: torch.Tensor, b_router: torch.Tensor) -> None:
        """
        Route with these from now on; the counterpart of :meth:`applied_router`.

        Args:
            W_router: Router weights, ``[d_in, num_experts]``.
            b_router: Router centre, ``[d_in]``.

        Raises:
            ValueError: If one has another shape; the router stays as it was then.
        """
        new = {"W_router": W_router, "b_router": b_router}
        for name, tensor in new.items():
            # Copying would repeat what is smaller.
            if tensor.shape != (shape := getattr(self, name).shape):
                raise ValueError(
                    f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}"
                )
        for name, tensor in new.items():
            getattr(self, name).data.copy_(tensor)

    def _fold_encoder(self) -> None:
        """Fold omega, if there is one, into W_enc."""

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        if not 0 < scaling_factor < math.inf:
            raise ValueError(
                f"scaling_factor must be a finite number above 0, got {scaling_factor}"
            )
        # First, as float16 may be too small for it: nothing else has changed then.
        W_router, b_router = self.applied_router()
        self.set_router(W_router * scaling_factor, b_router / scaling_factor)
        super().fold_activation_norm_scaling_factor(scaling_factor)

    @override
    @torch.no_grad()
    def get_W_dec_norm(self) -> torch.Tensor:
        return decoder_norm(self.W_dec)

    @override
    @torch.no_grad()
    def fold_and_get_W_dec_norm(self) -> torch.Tensor:
        if not self.cfg.rescale_acts_by_decoder_norm:
            norms = self.get_W_dec_norm()
            rounding = max(1e-6, torch.finfo(norms.dtype).eps)
            if (norms - 1).abs().max() <= rounding:
                # Nothing to fold: Switch SAE's authors, say, keep decoder rows at norm 1.
                return norms
            raise NotImplementedError(
                "folding decoder norms other than 1 would change which latents TopK "
                "selects when rescale_acts_by_decoder_norm is False"
            )
        self._fold_encoder()
        return super().fold_and_get_W_dec_norm()

    @override
    @torch.no_grad()
    def fold_activation_whitening(
        self,
        mean: torch.Tensor,
        whitening_matrix: torch.Tensor,
        unwhitening_matrix: torch.Tensor,
    ) -> None:
        # First, as float16 may be too small for the router: nothing else has changed then.
        # It sees (x - mean) M - b_router = (x - (b_router M^-1 + mean)) M.
        W_router, b_router = self.applied_router()
        dtype = torch.promote_types(W_router.dtype, whitening_matrix.dtype)
        shift, M, inverse = (
            t.to(self.device, dtype)
            for t in (mean, whitening_matrix, unwhitening_matrix)
        )
        self.set_router(M @ W_router.to(dtype), b_router.to(dtype) @ inverse + shift)
        if self.cfg.rescale_acts_by_decoder_norm:
            # Unwhitening changes the decoder norms that TopK ranks by. Folded first,
            # they stay as they were.
            self.fold_W_dec_norm()
            self.cfg.rescale_acts_by_decoder_norm = False
        self._fold_encoder()
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        # safetensors refuses views that are not contiguous. Entries are rebound,
        # never changed in place: they share memory with the live parameters.
        super().process_state_dict_for_saving(state_dict)
        for name, tensor in state_dict.items():
            state_dict[name] = tensor.contiguous()

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """
        Save weights and config. Files that ``path`` has already stay until the new ones
        are complete; these then replace them, one right after the other.

        Args:
            path: Folder, made if it is missing.

        Returns:
            Paths of the weights and of the config.

        Raises:
            ValueError: If the config was changed to one that could not be loaded, or that
                is not what this SAE computes; before any file is touched.
        """
        self._require_valid_config()
        with replacing_files(path) as temporary:
            weights, cfg = super().save_model(temporary)
        return Path(path) / weights.name, Path(path) / cfg.name

    def _require_valid_config(self) -> None:
        """Refuse a config with which the weights, once saved, could not be loaded."""
        self.cfg.validate()
        self._require_sizes(dict(self.named_parameters()))
        # A TopK that replaced the config's own is in no file.
        if isinstance(self.activation_fn, TopK) and self._k != self.cfg.k:
            raise ValueError(
                f"k must be {self._k}, as in activation_fn, got {self.cfg.k}"
            )

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """
        Check that a file's tensors are those of this SAE, before any is loaded.

        Args:
            state_dict: Tensors of the file; subclasses adapt it in place.

        Raises:
            ValueError: If tensors are missing, unknown, of another shape or not of
                floating point; the message names all of them.
        """
        super().process_state_dict_for_loading(state_dict)
        require_tensors(self.cfg, state_dict, self._shapes_to_load(state_dict))

    def _shapes_to_load(self, state_dict: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that a file has to hold, given those that it holds."""
        return self._shapes()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.named_parameters()}

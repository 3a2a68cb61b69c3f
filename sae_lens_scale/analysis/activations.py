"""Activations at the hook of an SAE, and those of its latents: read, encoded, finite."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.temporal_sae import TemporalSAE
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name

from sae_lens_scale.loading.errors import take_heads
from sae_lens_scale.ops import SparseLatents
from sae_lens_scale.saes.mixture import MixtureSAE

from .corpus import require_iterable, to_tensor
from .language_model import LanguageModel, as_input

# Feature activations that exist at a time while a batch is encoded: 256 MiB in float32.
_MAX_ACTIVATIONS = 2**26


def hook_activations(
    model: LanguageModel, sae: SAE[Any], hook: str, ids: torch.Tensor
) -> torch.Tensor:
    """
    Run the model up to a hook, and read what the SAE reads there.

    Args:
        model: The language model.
        sae: The SAE.
        hook: The model's own name of the SAE's hook.
        ids: Token ids, ``[passages, tokens]``.

    Returns:
        ``[passages, tokens, d_in]``, on the model's device.

    Raises:
        ValueError: If the model does not reach the hook; if the activations there are not of
            all tokens, are not as wide as the SAE, or lack its head; if a passage is longer
            than the model's context.
    """
    ids = as_input(model, ids)
    _, cache = model.run_with_cache(
        ids,
        # Hugging Face models take no single name.
        names_filter=[hook],
        stop_at_layer=extract_stop_at_layer_from_tlens_hook_name(hook),
    )
    require_reached("hook_name", hook, hook in cache)
    require_tokens(hook, cache[hook], ids.shape)
    return of_heads(sae, cache[hook], hook, sae.cfg.d_in)


def require_reached(field: str, hook: str, reached: bool) -> None:
    """
    Refuse a hook that the model has, but whose activations it does not compute.

    Args:
        field: Field of the SAE's metadata that names the hook.
        hook: The model's own name of the hook.
        reached: Whether the model came past it.

    Raises:
        ValueError: If it did not.
    """
    if not reached:
        raise ValueError(
            f"sae.cfg.metadata.{field} must be a hook that the model reaches, got "
            f"{hook!r}; in TransformerLens, methods such as set_use_attn_result turn "
            "some on"
        )


def require_tokens(hook: str, x: torch.Tensor, shape: torch.Size) -> None:
    """
    Refuse activations that are not of each token, as those of positions are.

    Raises:
        ValueError: If their first dimensions are not ``shape``, passages and tokens.
    """
    if x.shape[:2] != shape:
        raise ValueError(
            f"activations at {hook} must be of each token, {tuple(shape)}, got shape "
            f"{tuple(x.shape)}"
        )


def of_heads(sae: SAE[Any], x: torch.Tensor, hook: str, width: int) -> torch.Tensor:
    """Take an SAE's head of activations, or join all; arguments as of :func:`.take_heads`."""
    return take_heads(x, sae.cfg.metadata.hook_head_index, hook, width)


def into_heads(sae: SAE[Any], x: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Put activations in place of those that :func:`of_heads` takes of ``x``."""
    head = sae.cfg.metadata.hook_head_index
    if head is None:
        return new.reshape(x.shape)
    x = x.clone()
    x[:, :, head] = new
    return x


@contextmanager
def heads_are_joined(sae: SAE[Any]) -> Iterator[None]:
    """Let an SAE of hook_z take activations whose heads are joined already."""
    joins_heads = sae.hook_z_reshaping_mode
    if joins_heads:
        sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        if joins_heads:
            sae.turn_on_forward_pass_hook_z_reshaping()


def encode_in_parts(sae: SAE[Any], x: torch.Tensor) -> Iterator[torch.Tensor]:
    """
    Encode activations ``[passages, tokens, d_in]``, a part at a time.

    Yields:
        Feature activations of the next tokens, ``[part, d_sae]``; all NaN on a token whose
        activations, or any of whose feature activations, are NaN or infinite.
    """
    if isinstance(sae, TemporalSAE):
        # Alone in that it reads a token's passage.
        parts = x.split(1)
    else:
        parts = x.flatten(0, 1).split(max(1, _MAX_ACTIVATIONS // sae.cfg.d_sae))
    with heads_are_joined(sae):
        for part in parts:
            part = part.to(sae.device)
            acts = sae.encode(part).to_dense().flatten(0, -2)
            bad = ~(_finite(acts) & _finite(part.flatten(0, -2)))
            if bad.any():
                acts = acts.masked_fill(bad.unsqueeze(-1), torch.nan)
            yield acts


def encode_sparsely(
    sae: SAE[Any], x: torch.Tensor
) -> Iterator[tuple[torch.Tensor, SparseLatents]]:
    """
    Encode activations ``[passages, tokens, d_in]``, a part at a time, as
    :func:`encode_in_parts`, for a mixture without d_sae-wide activations.

    Yields:
        Mask of the tokens that are finite as there, ``[part]``, and the next tokens' latents
        and their activations, ``[part, m]``, which are 0 on the others.
    """
    if not isinstance(sae, MixtureSAE):
        for acts in encode_in_parts(sae, x):
            finite = ~acts[:, 0].isnan()
            latents = torch.arange(sae.cfg.d_sae, device=acts.device).expand_as(acts)
            yield finite, SparseLatents(acts.nan_to_num(0), latents)
        return
    with heads_are_joined(sae):
        for part in x.flatten(0, 1).split(max(1, _MAX_ACTIVATIONS // sae.cfg.d_in)):
            part = part.to(sae.device)
            found = sae.encode_sparse(part)
            finite = _finite(found.values) & _finite(part)
            yield (
                finite,
                found._replace(
                    values=found.values.masked_fill(~finite.unsqueeze(-1), 0)
                ),
            )


def require_finite(
    name: str, values: torch.Tensor, batch: int, ignored: torch.Tensor | None = None
) -> None:
    """
    Refuse values among which NaN or infinite ones would be ranked, summed or counted.

    Args:
        name: What they are.
        values: ``[..., width]``, in which a row is a token's.
        batch: Index of the batch that they are of.
        ignored: Mask of the tokens that do not count, ``[...]``.

    Raises:
        ValueError: The message names the batch and its first such token.
    """
    bad = ~_finite(values)
    if ignored is not None:
        bad &= ~ignored.to(bad.device)
    if bad.any():
        place = tuple(torch.atleast_1d(bad).nonzero()[0].tolist())
        raise ValueError(
            f"{name} must be finite, got NaN or infinite values in batch {batch}, at "
            f"token {place[0] if len(place) == 1 else place}"
        )


def _finite(values: torch.Tensor) -> torch.Tensor:
    """Tell which rows hold finite values only; builds nothing as large as the values."""
    if not values.shape[-1]:
        return torch.ones(values.shape[:-1], dtype=torch.bool, device=values.device)
    # Both keep NaN. aminmax takes several times as long.
    return values.amin(dim=-1).isfinite() & values.amax(dim=-1).isfinite()


def finite_batches(
    activations: Iterable[torch.Tensor], sae: SAE[Any]
) -> Iterator[torch.Tensor]:
    """
    Move batches of activations, tensors or arrays ``[..., d_in]``, to an SAE's device.

    Heads of hook_z, ``[..., heads, d_head]``, are joined.

    Raises:
        ValueError: If a batch is nothing of the kind, is not as wide as the SAE, or holds NaN
            or infinite values.
    """
    d_in = sae.cfg.d_in
    for i, batch in enumerate(require_iterable("activations", activations)):
        batch = to_tensor("activations", batch)
        if sae.hook_z_reshaping_mode and batch.ndim > 1 and batch.shape[-1] != d_in:
            batch = batch.flatten(-2)
        # A dense SAE would stretch a last dimension of 1 to d_in without an error.
        if batch.shape[-1:] != (d_in,) or batch.is_complex():
            raise ValueError(
                f"activations must be real numbers [..., d_in={d_in}], got "
                f"{batch.dtype} of shape {tuple(batch.shape)}"
            )
        batch = batch.to(sae.device)
        require_finite("activations", batch, i)
        yield batch

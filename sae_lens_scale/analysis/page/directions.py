"""Decoder rows of latents: those nearest to each, and the tokens that they promote."""

from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from tqdm.auto import tqdm

from sae_lens_scale.analysis.language_model import LanguageModel, direct_logits
from sae_lens_scale.analysis.redundancy import PROGRESS_DELAY, unit_rows
from sae_lens_scale.saes.mixture import MixtureSAE

# Neighbours and tokens that are listed for a latent.
_LISTED = 8
# Latents whose cosines, or logits, are in memory at once.
_BLOCK = 512


class Directions(NamedTuple):
    """
    Properties of the decoder rows of some latents.

    Attributes:
        nearest: Positions, among these latents, of the eight with the largest cosines,
            or of all others where there are fewer, ``[latents, 8]``.
        cosines: Those cosines, ``[latents, 8]``.
        within: Largest cosine with another of the same expert, ``[latents]``; -1 without
            any.
        between: Largest cosine with one of another expert, ``[latents]``; -1 without any.
        promoted: Token ids whose logits the direction raises most, ``[latents, 8]``; of
            width 0 where it does not write into the residual stream.
        suppressed: Token ids whose logits it lowers most, the same.
    """

    nearest: torch.Tensor
    cosines: torch.Tensor
    within: torch.Tensor
    between: torch.Tensor
    promoted: torch.Tensor
    suppressed: torch.Tensor


@torch.no_grad()
def directions_of(
    model: LanguageModel, sae: SAE[Any], latents: torch.Tensor, verbose: bool
) -> Directions:
    """
    Compare the decoder rows of some latents with each other and with the unembedding.

    Args:
        model: The language model.
        sae: The SAE.
        latents: Indices of at least one latent, ``[latents]``.
        verbose: Show a progress bar, when it takes long.

    Returns:
        Tensors on the CPU.

    Raises:
        ValueError: If a decoder row is not finite.
    """
    units = unit_rows(sae.W_dec[latents.to(sae.device)])
    size = sae.cfg.expert_size if isinstance(sae, MixtureSAE) else sae.cfg.d_sae
    experts = latents.to(units.device) // size
    out = sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name
    progress = tqdm(
        torch.arange(len(latents), device=units.device).split(_BLOCK),
        desc="Decoder directions",
        unit="block",
        delay=PROGRESS_DELAY,
        disable=not verbose,
    )
    blocks = [
        (*_neighbours(units, experts, block), *_effects(model, out, units[block]))
        for block in progress
    ]
    return Directions(*(torch.cat(parts).cpu() for parts in zip(*blocks, strict=True)))


def _neighbours(
    units: torch.Tensor, experts: torch.Tensor, block: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Nearest rows, their cosines, and the largest ones within and between experts."""
    cosines = units[block] @ units.T
    cosines.scatter_(1, block.unsqueeze(-1), -torch.inf)
    nearest = cosines.topk(min(_LISTED, len(units) - 1))
    same = experts[block].unsqueeze(-1) == experts
    within, between = (
        cosines.masked_fill(left_out, -torch.inf).amax(dim=-1).clamp(min=-1)
        for left_out in (~same, same)
    )
    return nearest.indices, nearest.values, within, between


def _effects(
    model: LanguageModel, hook: str, units: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids whose logits the directions raise and lower most."""
    logits = direct_logits(model, hook, units)
    if logits is None:
        nothing = torch.zeros(len(units), 0, dtype=torch.int64, device=units.device)
        return nothing, nothing
    listed = min(_LISTED, logits.shape[-1])
    return logits.topk(listed).indices, logits.topk(listed, largest=False).indices

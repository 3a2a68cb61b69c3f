"""Redundancy: similarity of the latents of a dictionary."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from tqdm.auto import tqdm

from .corpus import require_integer, require_number, to_tensor

# Seconds after which a computation shows a progress bar.
PROGRESS_DELAY = 5


@dataclass(frozen=True)
class FeatureRedundancy:
    """
    Share of latents that have a near-duplicate.

    Attributes:
        num_latents: Number of latents that were compared.
        threshold: Cosine above which two latents count as near-duplicates.
        share_above: Share of latents whose largest cosine with another exceeds it.
        mean_max_cosine: Mean over latents of the largest cosine with another.
        alive: The same for the latents that are alive, compared with each other only;
            None if it was not asked for.
        between_experts: Share of latents, dead ones included, whose largest cosine with a
            latent of another expert exceeds the threshold; None for a single expert, and
            in ``alive``.
    """

    num_latents: int
    threshold: float
    share_above: float
    mean_max_cosine: float
    alive: "FeatureRedundancy | None" = None
    between_experts: float | None = None


def unit_rows(rows: Float[torch.Tensor, "n d_in"]) -> Float[torch.Tensor, "n d_in"]:
    """
    Divide rows of W_dec by their norms, in float32 at least; zeros stay zero.

    Raises:
        ValueError: If a value is NaN or infinite.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    largest = rows.abs().amax(dim=-1, keepdim=True)
    if not largest.isfinite().all():
        raise ValueError("W_dec must be finite, got NaN or infinite values")
    # Squares of very small or large entries would vanish or overflow. After this the norm
    # of a row that is not zero is at least 1.
    rows = rows / torch.where(largest > 0, largest, 1)
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1)


@torch.no_grad()
def max_cosine_similarity(
    W_dec: Float[torch.Tensor, "d_sae d_in"], block_size: int = 2048
) -> Float[torch.Tensor, " d_sae"]:
    """
    Compute each latent's largest cosine with any other latent.

    Exact, in blocks of latents against latents, each pair of blocks once; a row of zeros
    has cosine 0 with every other row. Shows a progress bar when it takes long.

    Args:
        W_dec: Decoder weights, ``[d_sae, d_in]``, of any floating point type, on any
            device; or an array. Norms of the rows do not matter.
        block_size: Latents per block (b). Needs ``b (5 b + 24 d_in)`` bytes at most beside
            W_dec and the result.

    Returns:
        ``[d_sae]``, between -1 and 1, in float32 at least.

    Raises:
        ValueError: If W_dec is not two-dimensional, has fewer than two rows or holds NaN
            or infinite values, or if block_size is not positive.
    """
    return _max_cosines(_decoder(W_dec), block_size).overall


@torch.no_grad()
def feature_redundancy(
    W_dec: Float[torch.Tensor, "d_sae d_in"],
    threshold: float = 0.9,
    alive: Bool[torch.Tensor, " d_sae"] | None = None,
    block_size: int = 2048,
    num_experts: int = 1,
) -> FeatureRedundancy:
    """
    Measure the share of latents that nearly duplicate another (section 3.3.1 and figure 8
    of the Scale SAE paper).

    A duplicate may be of another expert, which is the paper's subject, or of the same one;
    ``num_experts`` separates the two.

    Args:
        W_dec: Decoder weights, ``[d_sae, d_in]``; see :func:`max_cosine_similarity`.
        threshold: Cosine that a latent's largest one has to exceed, between -1 and 1.
        alive: Mask of the latents that are alive, ``[d_sae]``. If given, these are also
            measured apart from the rest, at no extra cost.
        block_size: Latents per block; see :func:`max_cosine_similarity`.
        num_experts: Number of experts, each of equally many neighbouring latents; divides
            d_sae.

    Raises:
        ValueError: If threshold is out of range, alive is not a boolean tensor
            ``[d_sae]`` or marks fewer than two latents, num_experts does not divide d_sae,
            or as for :func:`max_cosine_similarity`.
    """
    W_dec = _decoder(W_dec)
    threshold = require_number("threshold", threshold)
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold must be between -1 and 1, got {threshold}")
    num_experts = require_integer("num_experts", num_experts, 1)
    if len(W_dec) % num_experts:
        raise ValueError(
            f"num_experts must divide d_sae={len(W_dec)}, got {num_experts}"
        )
    if alive is not None:
        alive = to_tensor("alive", alive)
        if alive.dtype != torch.bool or alive.shape != W_dec.shape[:1]:
            raise ValueError(
                f"alive must be a boolean tensor of shape [d_sae={len(W_dec)}], got "
                f"{alive.dtype} of shape {tuple(alive.shape)}"
            )
        if alive.sum() < 2:
            raise ValueError(
                f"alive must mark at least two latents, got {int(alive.sum())}"
            )
        alive = alive.to(W_dec.device)
    found = _max_cosines(W_dec, block_size, alive, num_experts)
    return _summary(
        found.overall,
        threshold,
        None if alive is None else _summary(found.among_alive[alive], threshold),
        found.between_experts,
    )


def _decoder(W_dec: Any) -> Float[torch.Tensor, "d_sae d_in"]:
    """Decoder weights, of a tensor, an array or lists."""
    W_dec = to_tensor("W_dec", W_dec)
    if W_dec.ndim != 2 or len(W_dec) < 2 or not W_dec.shape[1]:
        raise ValueError(
            "W_dec must have shape [d_sae, d_in] with at least two rows, got "
            f"{tuple(W_dec.shape)}"
        )
    if W_dec.is_complex():
        raise ValueError(f"W_dec must hold real numbers, got {W_dec.dtype}")
    return W_dec


class _MaxCosines(NamedTuple):
    """
    Largest cosines of each latent, all ``[d_sae]``.

    Attributes:
        among_alive: With another latent that is alive.
        overall: With any other latent.
        between_experts: With a latent of another expert; None for a single expert.
    """

    among_alive: Float[torch.Tensor, " d_sae"]
    overall: Float[torch.Tensor, " d_sae"]
    between_experts: Float[torch.Tensor, " d_sae"] | None


def _max_cosines(
    W_dec: Float[torch.Tensor, "d_sae d_in"],
    block_size: int,
    alive: Bool[torch.Tensor, " d_sae"] | None = None,
    num_experts: int = 1,
) -> _MaxCosines:
    # A block of more latents than there are is one of all.
    block_size = min(require_integer("block_size", block_size, 1), len(W_dec))
    all_latents = torch.arange(len(W_dec), device=W_dec.device)
    experts = all_latents // (len(W_dec) // num_experts)
    if alive is None:
        alive = torch.ones_like(all_latents, dtype=torch.bool)
    # The latents that are alive come first, in blocks of their own.
    blocks = list(all_latents[alive].split(block_size))
    last_alive = len(blocks) - 1
    if not alive.all():
        blocks += all_latents[~alive].split(block_size)
    dtype = torch.promote_types(W_dec.dtype, torch.float32)
    largest = torch.full((len(W_dec),), -torch.inf, dtype=dtype, device=W_dec.device)
    among_alive, between = largest, largest.clone()
    progress = tqdm(
        total=len(blocks) * (len(blocks) + 1) // 2,
        desc="cosines between latents",
        unit="block",
        delay=PROGRESS_DELAY,
    )
    with progress, torch.autocast(W_dec.device.type, enabled=False):
        for i, latents in enumerate(blocks):
            rows = unit_rows(W_dec[latents])
            for others in blocks[: i + 1]:
                if others is latents:
                    cosines = (rows @ rows.T).fill_diagonal_(-torch.inf)
                else:
                    cosines = rows @ unit_rows(W_dec[others]).T
                _raise_to(largest, latents, others, cosines)
                if num_experts > 1:
                    same = experts[latents].unsqueeze(-1) == experts[others]
                    cosines.masked_fill_(same, -torch.inf)
                    _raise_to(between, latents, others, cosines)
                progress.update()
            if i == last_alive:
                among_alive = largest.clamp(-1, 1)
    return _MaxCosines(
        among_alive,
        largest.clamp(-1, 1),
        between.clamp(-1, 1) if num_experts > 1 else None,
    )


def _raise_to(
    largest: torch.Tensor,
    latents: torch.Tensor,
    others: torch.Tensor,
    cosines: torch.Tensor,
) -> None:
    for block, found in ((latents, cosines.amax(dim=1)), (others, cosines.amax(dim=0))):
        largest[block] = torch.maximum(largest[block], found)


def _summary(
    largest: Float[torch.Tensor, " n"],
    threshold: float,
    alive: FeatureRedundancy | None = None,
    between_experts: Float[torch.Tensor, " n"] | None = None,
) -> FeatureRedundancy:
    def share_above(cosines: torch.Tensor) -> float:
        return int((cosines > threshold).sum()) / len(cosines)

    return FeatureRedundancy(
        num_latents=len(largest),
        threshold=threshold,
        share_above=share_above(largest),
        mean_max_cosine=largest.cpu().double().mean().item(),
        alive=alive,
        between_experts=None
        if between_experts is None
        else share_above(between_experts),
    )

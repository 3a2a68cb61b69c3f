"""Similarity of the sets of latents that different tokens activate."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from sae_lens.saes.sae import SAE
from tqdm.auto import tqdm

from sae_lens_scale.saes.mixture import MixtureSAE
from sae_lens_scale.saes.mixture.extension_points import is_hooked

from .activations import finite_batches, heads_are_joined, require_finite
from .corpus import require_integer, require_number
from .redundancy import PROGRESS_DELAY

# Float32 values that overlaps of a block of tokens with all tokens may take: 64 MiB, and
# twice that again for counting them.
_BLOCK_VALUES = 1 << 24


@dataclass(frozen=True)
class ActivationSimilarity:
    """
    The mean overlap of the latents that two tokens activate.

    Attributes:
        similarity: Mean over pairs of tokens of the latents that both activate, divided
            by ``k``.
        tokens: Number of tokens.
        k: The divisor.
        l0: Mean number of latents that a token activates.
    """

    similarity: float
    tokens: int
    k: float
    l0: float


@dataclass(frozen=True)
class OverlapHistogram:
    """
    The distribution of the number of latents that two tokens both activate.

    Attributes:
        pairs: ``pairs[n]`` is the number of pairs of tokens that have n latents in
            common; from 0 to the SAE's configured k, or to the largest number of latents
            that a token activates if that is more or the SAE has no k.
        tokens: Number of tokens among which all pairs were counted.
        tokens_given: Number of tokens that these were sampled from.
    """

    pairs: list[int]
    tokens: int
    tokens_given: int

    @property
    def shares(self) -> list[float]:
        """``pairs`` divided by their sum."""
        total = sum(self.pairs)
        return [count / total for count in self.pairs]

    @property
    def mean(self) -> float:
        """Mean number of latents that two tokens have in common."""
        return sum(n * c for n, c in enumerate(self.pairs)) / sum(self.pairs)


@torch.no_grad()
def activation_similarity(
    sae: SAE[Any], activations: Iterable[torch.Tensor], k: float | None = None
) -> ActivationSimilarity:
    """
    Measure the mean similarity of the sets of latents that tokens activate (equation A.3
    and figure 7 of the Scale SAE paper).

    With S_i the latents that are not zero on token i, this is the mean of
    ``|S_i ∩ S_j| / k`` over all pairs of different tokens. A latent that fires on c
    tokens is in c (c - 1) of the T (T - 1) ordered intersections: that sum is formed, in
    integers, without visiting pairs.

    Args:
        sae: Any SAE of SAELens, mixture or dense.
        activations: Batches of raw activations, each ``[..., d_in]``.
        k: The paper's K_total, the number of latents that a token activates. None takes
            the SAE's configured k, as the paper does, and without one (ReLU, Gated,
            JumpReLU SAEs) the mean L0 of these tokens. With a configured k, tokens that
            activate fewer latents count as less similar, even to their equals.

    Raises:
        ValueError: If there are fewer than two tokens, activations are not finite, k is
            not a positive number, or no latent fires where k is the mean L0.
    """
    if k is not None:
        k = require_number("k", k)
        if not (math.isfinite(k) and k > 0):
            raise ValueError(f"k must be a positive number, got {k}")
    tokens = 0
    counts = torch.zeros(sae.cfg.d_sae, dtype=torch.int64, device=sae.device)
    for lengths, latents in active_latents(sae, activations):
        tokens += len(lengths)
        counts += latents.bincount(minlength=len(counts))
    _require_two_tokens(tokens)
    # Python's integers: with a billion tokens, squares no longer fit into 64 bits.
    per_latent = [count for count in counts.tolist() if count]
    l0 = sum(per_latent) / tokens
    if k is None:
        k = getattr(sae.cfg, "k", l0)
    if not k:
        raise ValueError("activations must activate at least one latent, got none")
    common = sum(count * (count - 1) for count in per_latent)
    return ActivationSimilarity(
        similarity=common / (tokens * (tokens - 1)) / k,
        tokens=tokens,
        k=float(k),
        l0=l0,
    )


@torch.no_grad()
def overlap_histogram(
    sae: SAE[Any],
    activations: Iterable[torch.Tensor],
    max_tokens: int = 16_384,
    seed: int = 0,
) -> OverlapHistogram:
    """
    Count the latents that two tokens both activate, for all pairs of tokens (k_ij,
    appendix D and figure 11 of the Scale SAE paper).

    Counts all pairs among the tokens given, or among a uniform random sample of them if
    there are more than ``max_tokens``. Time grows with the square of the tokens counted;
    memory stays under half a GiB, plus the compact activations. Shows a progress bar when
    it takes long.

    Args:
        sae: Any SAE of SAELens, mixture or dense.
        activations: Batches of raw activations, each ``[..., d_in]``.
        max_tokens: Number of tokens to count pairs among at most, at least 2.
        seed: Seed of the sample, which does not depend on the division into batches.

    Raises:
        ValueError: If there are fewer than two tokens, activations are not finite or
            max_tokens is less than 2.
    """
    max_tokens = require_integer("max_tokens", max_tokens, 2)
    generator = np.random.default_rng(require_integer("seed", seed, 0))
    given = 0
    # Tokens get random ranks as they come; those of the lowest ranks stay.
    ranks = torch.zeros(0, dtype=torch.float64, device="cpu")
    lengths = latents = torch.zeros(0, dtype=torch.int64, device="cpu")
    for new_lengths, new_latents in active_latents(sae, activations):
        given += len(new_lengths)
        new_ranks = torch.from_numpy(generator.random(len(new_lengths)))
        ranks = torch.cat([ranks, new_ranks])
        lengths = torch.cat([lengths, new_lengths.cpu()])
        latents = torch.cat([latents, new_latents.cpu()])
        if len(ranks) > max_tokens:
            keep = ranks <= ranks.kthvalue(max_tokens).values
            latents = latents[keep.repeat_interleave(lengths)]
            ranks, lengths = ranks[keep], lengths[keep]
    _require_two_tokens(len(lengths))
    pairs = _count_overlaps(
        lengths.to(sae.device),
        latents.to(sae.device),
        largest=max(int(lengths.max()), int(getattr(sae.cfg, "k", 0))),
    )
    return OverlapHistogram(
        pairs=pairs.tolist(), tokens=len(lengths), tokens_given=given
    )


def _count_overlaps(
    lengths: Int[torch.Tensor, " tokens"],
    latents: Int[torch.Tensor, " n"],
    largest: int,
) -> Int[torch.Tensor, " overlaps"]:
    """Count pairs of tokens by shared latents; ``lengths`` divides ``latents`` by token."""
    tokens = len(lengths)
    used, latents = latents.unique(return_inverse=True)
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    pairs = torch.zeros(largest + 1, dtype=torch.int64, device=lengths.device)
    block_size = max(1, _BLOCK_VALUES // (tokens + len(used)))
    blocks = range(0, tokens, block_size)
    for start in tqdm(blocks, desc="overlaps of tokens", delay=PROGRESS_DELAY):
        size = min(block_size, tokens - start)
        begin, end = int(starts[start]), int(starts[start + size])
        positions = torch.arange(size, device=lengths.device)
        positions = positions.repeat_interleave(lengths[start : start + size])
        # For each latent the block's tokens that activate it. Sums in float32 are exact.
        members = torch.zeros(
            max(1, len(used)), size, dtype=torch.float32, device=lengths.device
        )
        members[latents[begin:end], positions] = 1
        overlaps = F.embedding_bag(
            latents[begin:], members, starts[start:-1] - begin, mode="sum"
        )
        within = overlaps[:size].tril(-1)
        for part in (within, overlaps[size:]):
            pairs += part.flatten().long().bincount(minlength=len(pairs))
        # tril leaves zeros for each token with itself and for pairs the other way round.
        pairs[0] -= size * (size + 1) // 2
    return pairs


def active_latents(
    sae: SAE[Any], activations: Iterable[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """
    Find the latents of any SAE that are not zero on each token, ``[..., d_in]``.

    For a mixture d_sae values per token are never built, unless a hook may change the
    activations.

    Yields:
        For each batch the number of latents that each token activates, ``[tokens]``, and
        these latents, token after token, ``[sum of the former]``; both int64.

    Raises:
        ValueError: If activations, or feature activations, are not finite.
    """
    for i, batch in enumerate(finite_batches(activations, sae)):
        # A hook may select an expert twice.
        if isinstance(sae, MixtureSAE) and not is_hooked(sae.hook_expert_indices):
            with heads_are_joined(sae):
                values, indices = sae.encode_sparse(batch)
            require_finite("feature activations", values, i)
            indices = indices.reshape(-1, indices.shape[-1])
            active = values.reshape(indices.shape) != 0
            yield active.sum(dim=-1), indices[active]
        else:
            with heads_are_joined(sae):
                acts = sae.encode(batch).to_dense()
            require_finite("feature activations", acts, i)
            active = acts.reshape(-1, acts.shape[-1]) != 0
            yield active.sum(dim=-1), active.nonzero()[:, 1]


def _require_two_tokens(tokens: int) -> None:
    if tokens < 2:
        raise ValueError(f"activations must hold at least two tokens, got {tokens}")

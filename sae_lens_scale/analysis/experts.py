"""Experts of a mixture: their use, coactivation, similarity and amplification."""

import math
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sae_lens.saes.sae import SAE
from tqdm.auto import tqdm

from sae_lens_scale.saes.mixture import MixtureSAE

from .activations import finite_batches, heads_are_joined, require_finite
from .corpus import require_integer, require_number
from .redundancy import PROGRESS_DELAY, feature_redundancy, unit_rows

# Latents whose unit vectors are in memory at once: an expert may have a million.
_BLOCK = 8192


@dataclass(frozen=True)
class ExpertUsage:
    """
    Distribution of tokens over the experts of a router.

    Attributes:
        counts: Number of tokens that selected each expert, ``num_experts`` entries.
        idle_experts: Number of experts that no token selected.
        entropy: Entropy of the router's selections divided by its maximum: 1 if all experts
            are selected equally often, 0 if it is always the same one. Shared experts,
            which all tokens select, do not count.
    """

    counts: list[int]
    idle_experts: int
    entropy: float

    @property
    def cumulative_shares(self) -> list[float]:
        """
        Cumulative distribution of the selections (figure 6b of the Scale SAE paper).

        Entry i of the ``num_experts`` entries is the share of all selections that went to
        the i + 1 most used experts, so that the last is 1.
        """
        total = sum(self.counts)
        descending = sorted(self.counts, reverse=True)
        return [count / total for count in accumulate(descending)]


@dataclass(frozen=True)
class ExpertPair:
    """
    Two experts that tokens select together.

    Attributes:
        first: One expert.
        second: The other, of larger index.
        tokens: Number of tokens that selected both.
        lift: That number divided by its expectation if the experts were selected
            independently: the product of their counts, divided by the number of tokens.
    """

    first: int
    second: int
    tokens: int
    lift: float


@dataclass(frozen=True)
class ExpertCoactivation:
    """
    Pairs of experts that tokens select together.

    Attributes:
        tokens: Number of tokens.
        pairs_used: Number of pairs of experts that at least one token selected together.
        pairs: Number of all pairs of experts.
        strongest: The pairs that most tokens selected together, most frequent first.
    """

    tokens: int
    pairs_used: int
    pairs: int
    strongest: list[ExpertPair]


@dataclass(frozen=True)
class SetSimilarity:
    """
    Similarity of the decoder rows of a set of latents.

    Attributes:
        mean_cosine: Mean cosine over all pairs of different latents.
        mean_max_cosine: Mean over latents of the largest cosine with another of the set.
        share_above: Share of latents whose largest cosine exceeds the threshold.
    """

    mean_cosine: float
    mean_max_cosine: float
    share_above: float


@dataclass(frozen=True)
class ExpertSimilarity:
    """
    Similarity within experts, against that within sets of latents of any expert.

    Attributes:
        threshold: Cosine that ``share_above`` refers to.
        intra: Mean over all experts.
        inter: Mean over random sets of latents of all experts, each as large as an expert.
        per_expert: The values whose mean is ``intra``, ``num_experts`` entries.
        per_sample: The values whose mean is ``inter``.
    """

    threshold: float
    intra: SetSimilarity
    inter: SetSimilarity
    per_expert: list[SetSimilarity]
    per_sample: list[SetSimilarity]


@torch.no_grad()
def expert_usage(
    sae: MixtureSAE[Any], activations: Iterable[torch.Tensor]
) -> ExpertUsage:
    """
    Count the experts that an SAE selects for all tokens of all batches.

    These are the router's selections. The paper's authors count, for figure 6b, the
    experts that hold one of a token's three strongest latents.

    Args:
        sae: A Scale or Switch SAE.
        activations: Batches of raw activations, each ``[..., d_in]``.

    Raises:
        ValueError: If the SAE is no mixture, activations are not finite or there are no
            tokens.
    """
    _require_mixture(sae)
    num_experts = sae.cfg.num_experts
    counts = torch.zeros(num_experts, dtype=torch.int64, device=sae.device)
    for indices in _selected_experts(sae, activations):
        counts += indices.flatten().bincount(minlength=num_experts)
    routed = counts[sae.cfg.num_shared_experts :].cpu().double()
    entropy = torch.special.entr(routed / routed.sum()).sum().item()
    return ExpertUsage(
        counts=counts.tolist(),
        idle_experts=int((counts == 0).sum()),
        entropy=entropy / math.log(len(routed)) if len(routed) > 1 else 1.0,
    )


@torch.no_grad()
def expert_coactivation(
    sae: MixtureSAE[Any], activations: Iterable[torch.Tensor], num_strongest: int = 20
) -> tuple[Int[torch.Tensor, "num_experts num_experts"], ExpertCoactivation]:
    """
    Count which experts tokens select together.

    Args:
        sae: A Scale or Switch SAE. A Switch SAE's tokens select one expert each, and no
            pairs.
        activations: Batches of raw activations, each ``[..., d_in]``.
        num_strongest: Number of pairs that the summary lists at most.

    Returns:
        Number of tokens that selected experts i and j, ``[num_experts, num_experts]``,
        int64, on the SAE's device: symmetric, with the counts of :func:`expert_usage` on
        the diagonal. And a summary of it.

    Raises:
        ValueError: If the SAE is no mixture, activations are not finite, there are no
            tokens or num_strongest is negative.
    """
    _require_mixture(sae)
    num_strongest = require_integer("num_strongest", num_strongest, 0)
    num_experts = sae.cfg.num_experts
    counts = torch.zeros(
        num_experts * num_experts, dtype=torch.int64, device=sae.device
    )
    tokens = 0
    for indices in _selected_experts(sae, activations):
        tokens += len(indices)
        for slot in range(indices.shape[-1]):
            cells = (indices[:, slot : slot + 1] * num_experts + indices).flatten()
            counts.scatter_add_(0, cells, torch.ones_like(cells))
    counts = counts.view(num_experts, num_experts)
    first, second = counts.triu(1).nonzero(as_tuple=True)
    together = counts[first, second]
    alone = counts.diagonal().tolist()
    # Stable, so that pairs of equal frequency come in the order of their experts.
    order = together.sort(descending=True, stable=True).indices[:num_strongest]
    strongest = [
        ExpertPair(i, j, both, both * tokens / (alone[i] * alone[j]))
        for i, j, both in zip(
            first[order].tolist(),
            second[order].tolist(),
            together[order].tolist(),
            strict=True,
        )
    ]
    return counts, ExpertCoactivation(
        tokens=tokens,
        pairs_used=len(together),
        pairs=math.comb(num_experts, 2),
        strongest=strongest,
    )


@torch.no_grad()
def expert_similarity(
    sae: MixtureSAE[Any],
    seed: int = 0,
    num_samples: int | None = None,
    threshold: float = 0.9,
) -> ExpertSimilarity:
    """
    Compare decoder rows within experts and within random sets of latents (figure 6a of
    the Scale SAE paper).

    Of each set's measures, section 3.3.1 calls ``share_above`` redundancy, and the
    authors' code plots it for experts and random sets. A random set is drawn without
    replacement from all latents and as large as an expert, so about one in num_experts of
    its pairs share an expert. Rows of zeros have cosine 0 with all others.

    Args:
        sae: A Scale or Switch SAE.
        seed: Of the random sets.
        num_samples: Number of random sets; as many as there are experts if None, as in
            the authors' code.
        threshold: Cosine above which two latents count as near-duplicates.

    Raises:
        ValueError: If the SAE is no mixture, an expert has fewer than two latents, W_dec
            is not finite, or num_samples or threshold are out of range.
    """
    _require_mixture(sae)
    cfg = sae.cfg
    if cfg.expert_size < 2:
        raise ValueError(
            f"sae must have at least two latents per expert, got d_sae={cfg.d_sae} and "
            f"num_experts={cfg.num_experts}"
        )
    samples = cfg.num_experts if num_samples is None else num_samples
    samples = require_integer("num_samples", samples, 1)
    threshold = require_number("threshold", threshold)
    generator = np.random.default_rng(require_integer("seed", seed, 0))
    drawn = (
        generator.choice(cfg.d_sae, cfg.expert_size, replace=False)
        for _ in range(samples)
    )
    progress = tqdm(
        chain(
            sae.W_dec.split(cfg.expert_size),
            (sae.W_dec[torch.from_numpy(chosen)] for chosen in drawn),
        ),
        desc="similarity of experts",
        total=cfg.num_experts + samples,
        delay=PROGRESS_DELAY,
    )
    found = [_set_similarity(rows, threshold) for rows in progress]
    per_expert, per_sample = found[: cfg.num_experts], found[cfg.num_experts :]
    return ExpertSimilarity(
        threshold=threshold,
        intra=_mean_similarity(per_expert),
        inter=_mean_similarity(per_sample),
        per_expert=per_expert,
        per_sample=per_sample,
    )


def scaling_factors(sae: SAE[Any]) -> list[float]:
    """
    Return the learned omega of each expert (equation 2.5, figure 2 of the Scale SAE paper).

    An expert's encoder deviates from its low-pass part 1 + omega times as much as its
    unscaled weights do.

    Args:
        sae: A Scale SAE that was trained with feature scaling: in training, from a
            training checkpoint, or exported. An export has omega in W_enc and in its
            metadata. Training that goes on from an export has omegas of its own, which
            start at zero; they are returned once any of them has moved.

    Returns:
        ``num_experts`` values.

    Raises:
        ValueError: If the SAE has no omegas, or metadata with others than one finite number
            for each expert.
    """
    omega = getattr(sae, "omega", None)
    recorded = sae.cfg.metadata.omega
    if omega is not None and (recorded is None or omega.any()):
        return omega.detach().tolist()
    if recorded is None:
        raise ValueError(
            "sae must be a Scale SAE trained with feature_scaling=True, got architecture "
            f"{sae.cfg.architecture()!r} without omega"
        )
    try:
        omegas = [float(value) for value in recorded]
    except (TypeError, ValueError):
        omegas = []
    if len(omegas) != sae.cfg.num_experts or not all(map(math.isfinite, omegas)):
        raise ValueError(
            f"sae.cfg.metadata.omega must be {sae.cfg.num_experts} finite numbers, got "
            f"{reprlib.repr(recorded)}"
        )
    return omegas


def _set_similarity(
    rows: Float[torch.Tensor, "n d_in"], threshold: float
) -> SetSimilarity:
    redundancy = feature_redundancy(rows, threshold)
    n = len(rows)
    units = map(unit_rows, rows.split(_BLOCK))
    sums = [(unit.sum(dim=0), unit.square().sum()) for unit in units]
    total, squares = (torch.stack(parts).sum(dim=0) for parts in zip(*sums))
    # |sum of u|^2 is the sum of u_i u_j over all i and j, i = j included.
    cosines = total.square().sum() - squares
    return SetSimilarity(
        mean_cosine=cosines.item() / (n * (n - 1)),
        mean_max_cosine=redundancy.mean_max_cosine,
        share_above=redundancy.share_above,
    )


def _mean_similarity(sets: list[SetSimilarity]) -> SetSimilarity:
    return SetSimilarity(
        mean_cosine=math.fsum(s.mean_cosine for s in sets) / len(sets),
        mean_max_cosine=math.fsum(s.mean_max_cosine for s in sets) / len(sets),
        share_above=math.fsum(s.share_above for s in sets) / len(sets),
    )


def _selected_experts(
    sae: MixtureSAE[Any], activations: Iterable[torch.Tensor]
) -> Iterator[Int[torch.Tensor, "tokens experts_per_token"]]:
    empty = True
    for i, batch in enumerate(finite_batches(activations, sae)):
        with heads_are_joined(sae):
            _, indices, probabilities = sae.route(batch)
        require_finite("the router's probabilities", probabilities, i)
        empty = empty and not indices.numel()
        yield indices.reshape(-1, indices.shape[-1])
    if empty:
        raise ValueError("activations must hold at least one token, got none")


def _require_mixture(sae: SAE[Any]) -> None:
    if not isinstance(sae, MixtureSAE):
        raise ValueError(
            "sae must be a mixture of experts ('scale' or 'switch'), got architecture "
            f"{sae.cfg.architecture()!r}"
        )

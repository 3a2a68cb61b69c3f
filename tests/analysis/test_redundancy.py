"""Largest cosines between latents, against a loop over all pairs."""

import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae_lens_scale.analysis.redundancy import (
    FeatureRedundancy,
    feature_redundancy,
    max_cosine_similarity,
)


def random_decoder(d_sae: int = 23, d_in: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(d_sae, d_in, generator=generator)
    return W_dec * torch.rand(d_sae, 1, generator=generator).add(0.1)


def cosine(u: list[float], v: list[float]) -> float:
    norms = math.hypot(*u) * math.hypot(*v)
    return math.fsum(a * b for a, b in zip(u, v, strict=True)) / norms if norms else 0.0


def slow_max_cosines(W_dec: torch.Tensor) -> torch.Tensor:
    rows = W_dec.double().tolist()
    largest = []
    for i, u in enumerate(rows):
        largest.append(max(cosine(u, v) for j, v in enumerate(rows) if j != i))
    return torch.tensor(largest)


class Operations(TorchDispatchMode):
    """Elements of the largest result of any operation, and number of matrix products."""

    largest = 0
    products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.products += func is torch.ops.aten.mm.default
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
        return result


def decoder_of_norms(factor: float) -> torch.Tensor:
    """Every other row's largest entry is the factor."""
    W_dec = random_decoder()
    W_dec[::2] /= W_dec[::2].abs().amax(dim=1, keepdim=True)
    W_dec[::2] *= factor
    return W_dec


# Sums of squares of 400 entries of this size overflow float16.
LARGE = random_decoder(d_in=400) * 500
DECODERS = {
    "random": random_decoder(),
    "zero rows": torch.tensor([[1.0, 0], [0, 0], [-1, 0], [-1, 0.001], [0, 0]]),
    **{str(factor): decoder_of_norms(factor) for factor in (1e-42, 1e-30, 1e30, 1e38)},
    **{str(t): LARGE.to(t) for t in (torch.float64, torch.bfloat16, torch.float16)},
}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("block_size", [1, 2, 7, 22, 23, 24, 2048])
def test_max_cosine_is_that_of_a_loop_over_pairs_whatever_the_blocks(
    name: str, block_size: int
):
    W_dec = DECODERS[name]
    got = max_cosine_similarity(W_dec, block_size)
    assert got.dtype == torch.promote_types(W_dec.dtype, torch.float32)
    want = slow_max_cosines(W_dec)
    torch.testing.assert_close(got.float(), want, atol=1e-6, rtol=0)


def test_max_cosine_is_computed_in_float32_under_autocast_and_without_gradients():
    W_dec = torch.nn.Parameter(random_decoder())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = max_cosine_similarity(W_dec)
    assert not got.requires_grad
    assert torch.equal(got, max_cosine_similarity(W_dec))


def test_duplicates_have_cosine_1_and_opposites_minus_1_never_beyond():
    rows = random_decoder(200, 7)
    largest = max_cosine_similarity(torch.cat([rows, rows * 3]), 64)
    assert largest.max() <= 1
    torch.testing.assert_close(largest, torch.ones(400), atol=1e-6, rtol=0)
    opposite = max_cosine_similarity(torch.stack([rows[0], -rows[0]]))
    assert opposite.min() >= -1
    torch.testing.assert_close(opposite, -torch.ones(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("d_sae", "block", "products"),
    # By default at most 16 MiB in float32; all cosines of the paper's SAEs take 2.3 GiB.
    [(700, {"block_size": 50}, 15 * 16 // 2), (7 * 1024, {}, 5 * 6 // 2)],
)
def test_each_pair_of_blocks_is_multiplied_once_and_nothing_is_larger(
    d_sae: int, block: dict[str, int], products: int
):
    W_dec, alive = random_decoder(d_sae, 8), torch.arange(d_sae) % 3 > 0
    with Operations() as watched:
        feature_redundancy(W_dec, alive=alive, num_experts=7, **block)
    assert watched.products == products
    assert watched.largest <= block.get("block_size", 2048) ** 2


def test_feature_redundancy_counts_the_latents_strictly_above_the_threshold():
    # Two duplicates, a third at cosine 0.6 from them, and one on its own.
    W_dec = torch.tensor([[1.0, 0, 0], [2, 0, 0], [0.6, 0.8, 0], [0, 0, 1]])
    found = feature_redundancy(W_dec)
    mean = found.mean_max_cosine
    assert found == FeatureRedundancy(4, 0.9, 0.5, mean, alive=None)
    assert mean == pytest.approx((1 + 1 + 0.6 + 0) / 4)
    assert feature_redundancy(W_dec, threshold=0.5).share_above == 0.75
    assert feature_redundancy(W_dec, threshold=1).share_above == 0
    assert feature_redundancy(W_dec, threshold=0).share_above == 0.75
    assert feature_redundancy(W_dec, threshold=-0.1).share_above == 1


@pytest.mark.parametrize("block_size", [1, 3, 9, 100])
@pytest.mark.parametrize("share", [0.2, 0.4, 1])
def test_alive_latents_are_compared_with_each_other_only(block_size: int, share: float):
    W_dec = random_decoder(31, 4)
    alive = torch.rand(31, generator=torch.Generator().manual_seed(0)) < share
    found = feature_redundancy(W_dec, 0.8, alive, block_size)
    everything = feature_redundancy(W_dec, 0.8)
    assert found.alive is not None
    assert everything.alive is None
    for got, want in (
        (found, slow_max_cosines(W_dec)),
        (everything, slow_max_cosines(W_dec)),
        (found.alive, slow_max_cosines(W_dec[alive])),
    ):
        assert got.num_latents == len(want)
        assert got.share_above == (want > 0.8).double().mean().item()
        assert got.mean_max_cosine == pytest.approx(want.mean().item(), abs=1e-6)
    assert json.loads(json.dumps(asdict(found))) == asdict(found)


@pytest.mark.parametrize("block_size", [1, 5, 8, 100])
@pytest.mark.parametrize("num_experts", [2, 4, 24])
@pytest.mark.parametrize("with_dead", [False, True])
def test_redundancy_between_experts_is_that_of_latents_of_different_experts(
    block_size: int, num_experts: int, with_dead: bool
):
    W_dec = random_decoder(24, 3)
    alive = torch.rand(24, generator=torch.Generator().manual_seed(1)) < 0.5
    given = alive if with_dead else None
    found = feature_redundancy(W_dec, 0.8, given, block_size, num_experts)
    rows, size = W_dec.double().tolist(), 24 // num_experts
    apart = [
        max(cosine(u, v) for j, v in enumerate(rows) if j // size != i // size)
        for i, u in enumerate(rows)
    ]
    share = sum(c > 0.8 for c in apart) / 24
    assert found.between_experts == share
    assert 0 < share <= found.share_above
    everything = feature_redundancy(W_dec, 0.8, given, block_size)
    assert everything.between_experts is None
    assert replace(found, between_experts=None) == everything


def test_arrays_lists_and_numbers_of_NumPy_are_as_good():
    W_dec = random_decoder()
    want = feature_redundancy(W_dec, 0.5)
    threshold: Any = np.array(0.5)
    rows: list[Any] = [W_dec.numpy(), W_dec.tolist()]
    for given in rows:
        assert feature_redundancy(given, threshold) == want
        assert_close(max_cosine_similarity(given), max_cosine_similarity(W_dec))
    sizes: list[Any] = [np.int32(7), 10**30]
    for block_size in sizes:
        found = max_cosine_similarity(W_dec, block_size)
        assert_close(found, max_cosine_similarity(W_dec), atol=1e-6)


def test_what_cannot_be_measured_is_refused():
    W_dec = random_decoder()
    for shape in ((1, 5), (0, 5), (5,), (2, 3, 4), (5, 0), ()):
        with pytest.raises(ValueError, match=r"W_dec must have shape .* got \("):
            max_cosine_similarity(torch.ones(shape))
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        max_cosine_similarity(W_dec, 0)
    for bad in (math.nan, math.inf, -math.inf):
        W_bad = W_dec.clone()
        W_bad[20, 3] = bad
        with pytest.raises(ValueError, match="W_dec must be finite"):
            max_cosine_similarity(W_bad, 4)
    for threshold in (1.1, -1.1, math.nan):
        with pytest.raises(ValueError, match="threshold must be between -1 and 1"):
            feature_redundancy(W_dec, threshold)
    for alive in (torch.ones(23), torch.ones(22, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"alive must be .*d_sae=23.* got torch\."):
            feature_redundancy(W_dec, alive=alive)
    with pytest.raises(ValueError, match="alive must be numbers in tensors.* got"):
        feature_redundancy(W_dec, alive="all")  # type: ignore[arg-type]
    listed = [True] * 22 + [False]
    assert feature_redundancy(W_dec, alive=listed) == feature_redundancy(  # type: ignore[arg-type]
        W_dec, alive=torch.tensor(listed)
    )
    experts: list[Any] = [2, 0, 11.5]
    messages = ["divide d_sae=23, got 2", "be at least 1, got 0", "be an integer, got"]
    for num_experts, message in zip(experts, messages, strict=True):
        with pytest.raises(ValueError, match=f"num_experts must {message}"):
            feature_redundancy(W_dec, num_experts=num_experts)
    decoders: list[Any] = [None, "W_dec", [[1.0], [1.0, 2.0]], W_dec + 1j]
    for decoder in decoders:
        with pytest.raises(ValueError, match="W_dec must .*numbers.* got"):
            feature_redundancy(decoder)
    text: Any = "0.9"
    with pytest.raises(ValueError, match="threshold must be a number, got '0.9'"):
        feature_redundancy(W_dec, text)
    for marked in (0, 1):
        with pytest.raises(ValueError, match=f"at least two latents, got {marked}"):
            feature_redundancy(W_dec, alive=torch.arange(23) < marked)

"""
Bytes, memory and seconds of a training step of a Scale SAE on many GPUs, by arithmetic.

Each GPU, a rank, reads tokens of its own. Three layouts:

- ``data``: every rank has all weights. Gradients are summed over all ranks.
- ``experts``: ``ranks`` GPUs share out the experts, and gpus / ranks such groups are replicas of each other,
  over which gradients are summed. A token's vector travels to the owners of its experts, once to each: such a
  (token, owner) is a row, a (token, expert) a pair. Owners send back each pair's best ranking values; the
  token's home finds the best k of them all and answers with how many of each pair survive; owners decode the
  survivors, and home adds up their reconstructions.
- ``latents``: ``ranks`` GPUs share out the latents of every expert. Each sees all tokens of its group, and owns a
  row of every token; the rest is as with experts.

Experts are taken to be chosen evenly and independently; no expert is shared by all tokens. Bytes are those that one
rank sends. FLOPs are those of :mod:`reproduction.flops`, of which products with all latents of an
expert, and with the router, run at the speed of matrix products, and those with survivors at the speed of memory.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["data", "experts", "latents"]

# Multi-TopK's k, as a multiple of k.
_MULTI_TOPK_FACTOR = 4
# Times that a step passes over weights or tensors of their size outside Adam (the forward pass; the gradient
# zeroed, written, and read for its norm), and in it (weights, gradient and two moments read; all but the gradient
# written).
_PASSES, _PASSES_OF_ADAM = 4, 7
# Times that the pre-activations of a token's experts are written or read.
_PASSES_OVER_CANDIDATES = 4


@dataclass(frozen=True)
class Shape:
    """Sizes of a Scale SAE, by the names of its config."""

    d_in: int
    d_sae: int
    num_experts: int
    experts_per_token: int
    k: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.d_sae % self.num_experts:
            raise ValueError(
                f"d_sae must be a multiple of num_experts={self.num_experts}, got {self.d_sae}"
            )
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token must be at most num_experts={self.num_experts}, "
                f"got {self.experts_per_token}"
            )

    @property
    def expert_size(self) -> int:
        """Latents of an expert."""
        return self.d_sae // self.num_experts

    @property
    def candidates(self) -> int:
        """Latents of a token's experts."""
        return self.experts_per_token * self.expert_size

    @property
    def expert_parameters(self) -> int:
        """Numbers in the encoder, the decoder, encoder biases and omegas."""
        return (2 * self.d_in + 1) * self.d_sae + self.num_experts

    @property
    def other_parameters(self) -> int:
        """Numbers in the router and the two biases that are d_in wide; every rank has them."""
        return self.d_in * (self.num_experts + 2)


@dataclass(frozen=True)
class Layout:
    """
    Distribution of an SAE over GPUs.

    Args:
        kind: See the module.
        gpus: Number of all GPUs.
        ranks: Number of GPUs that have the SAE once between them; 1 with ``data``.
    """

    kind: Kind
    gpus: int
    ranks: int

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.gpus % self.ranks:
            raise ValueError(f"ranks must divide gpus={self.gpus}, got {self.ranks}")
        if self.kind == "data" and self.ranks != 1:
            raise ValueError(f"ranks must be 1 in data parallel, got {self.ranks}")

    @property
    def replicas(self) -> int:
        return self.gpus // self.ranks


@dataclass
class Assumptions:
    """Assumptions about the training and the GPUs; by default about nodes of 8 H100 of 80 GB."""

    tokens: int = 4096  # a rank's own tokens in a step
    dead: float = 0.05  # share of latents that are dead
    multi_topk: bool = True  # with the Multi-TopK loss, as by default
    bytes_per_element: int = 2  # of the vectors that travel: 2 in bfloat16
    bytes_per_value: int = 4  # of ranking values, gates and their gradients
    bytes_per_index: int = 8  # of experts
    bytes_per_count: int = 4  # of numbers of survivors
    bytes_per_weight: int = 4  # of weights, of gradients and of each Adam moment
    sharded_adam: bool = True  # replicas share out Adam's moments and work
    peak: float = 989  # TFLOP/s of a GPU's matrix products
    peak_share: float = 0.25  # share of it that is reached
    memory_bandwidth: float = 3350  # GB/s of a GPU's memory
    memory_share: float = 0.65  # share of it that is reached
    gpu_memory: float = 80  # GB of a GPU's memory
    gpus_per_node: int = 8  # GPUs of a node
    within_node: float = 450  # GB/s that a GPU sends to others of its node
    between_nodes: float = 50  # GB/s that a GPU sends to other nodes
    link_share: float = 0.8  # share of both that is reached
    overlap: float = 0.0  # share of communication that computing can hide
    collectives: int = 8  # per step, if GPUs exchange tokens, without gradients' 2
    latency: float = 20  # microseconds of a collective
    imbalance: float = 1.1  # the busiest owner's work, times the mean

    def __post_init__(self) -> None:
        for name in ("dead", "overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} must be from 0 to 1, got {getattr(self, name)}"
                )
        for name in ("peak_share", "memory_share", "link_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} must be above 0 and at most 1, got {getattr(self, name)}"
                )
        for name in ("collectives", "latency"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be at least 0 and finite, got {getattr(self, name)}"
                )
        for name in _AT_LEAST_1:
            if not 1 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be at least 1 and finite, got {getattr(self, name)}"
                )

    def reconstructions(self) -> int:
        """Vectors that owners send home for each row: the survivors', runners-up's and dead latents'."""
        return 1 + self.multi_topk + (self.dead > 0)

    def kept(self, shape: Shape) -> int:
        """Latents of a token that are decoded, runners-up included."""
        kept = _MULTI_TOPK_FACTOR * shape.k if self.multi_topk else shape.k
        return min(kept, shape.candidates)

    def dead_of_expert(self, shape: Shape) -> int:
        return math.ceil(self.dead * shape.expert_size)

    def dead_top_k(self, shape: Shape) -> int:
        """Dead latents that a token keeps by a TopK over its experts'; 0 if it keeps all there are."""
        most = max(1, shape.d_in // 2)
        dead = shape.experts_per_token * self.dead_of_expert(shape)
        return most if dead > most else 0


_AT_LEAST_1 = (
    "tokens",
    "bytes_per_element",
    "bytes_per_value",
    "bytes_per_index",
    "bytes_per_count",
    "bytes_per_weight",
    "peak",
    "memory_bandwidth",
    "gpu_memory",
    "gpus_per_node",
    "within_node",
    "between_nodes",
    "imbalance",
)


def owners(shape: Shape, ranks: int) -> float:
    """Expected number of ranks that have an expert of a token; their shares differ by at most one expert."""
    n, e = shape.num_experts, shape.experts_per_token
    share, larger = divmod(n, ranks)

    def chosen(experts: int) -> float:
        return 1 - math.comb(max(n - experts, 0), e) / math.comb(n, e)

    return larger * chosen(share + 1) + (ranks - larger) * chosen(share)


def wire_bytes(
    shape: Shape, layout: Layout, assumptions: Assumptions
) -> dict[str, float]:
    """Expected bytes that one rank sends in a step, by purpose."""
    a, g = assumptions, layout.ranks
    vector = shape.d_in * a.bytes_per_element
    if layout.kind == "latents":
        # Every other rank has latents of each of a token's experts, and sends one list of ranking values.
        rows = lists = g - 1
        pairs = rows * shape.experts_per_token
        candidates = math.ceil(shape.candidates / g)
        dead = math.ceil(shape.experts_per_token * a.dead_of_expert(shape) / g)
    else:
        # A token's home is one of g equally likely owners, and sends itself nothing.
        rows = owners(shape, g) * (g - 1) / g
        pairs = lists = shape.experts_per_token * (g - 1) / g
        candidates, dead = shape.expert_size, a.dead_of_expert(shape)
    values = min(a.kept(shape), candidates) + min(a.dead_top_k(shape), dead)
    counts = 1 + a.multi_topk + bool(a.dead_top_k(shape))
    of_token = {
        "tokens to owners": rows * vector
        + pairs * (a.bytes_per_index + a.bytes_per_value),
        "ranking values": lists * values * a.bytes_per_value,
        "prefixes": lists * counts * a.bytes_per_count,
        "reconstructions": rows * vector * a.reconstructions(),
        "reconstructions' gradients": rows * vector * a.reconstructions(),
        "gates' gradients": pairs * a.bytes_per_value,
    }
    # Size of the group that sums gradients, and numbers that it sums.
    sums = {
        "gradients of weights": (layout.replicas, shape.expert_parameters / g),
        # Packed together.
        "router and firing counts": (
            layout.gpus,
            shape.other_parameters + shape.d_sae,
        ),
    }
    return {purpose: a.tokens * sent for purpose, sent in of_token.items()} | {
        # A ring adds up shares of a tensor, then passes the sums on.
        purpose: 2 * (size - 1) / size * numbers * a.bytes_per_weight
        for purpose, (size, numbers) in sums.items()
    }


def memory_bytes(
    shape: Shape, layout: Layout, assumptions: Assumptions
) -> dict[str, float]:
    """
    Bytes of a rank's memory, by purpose.

    Buffers of activations are the bound of docs/performance.md, and twice what is exchanged, as it is both sent
    and received.
    """
    a, g = assumptions, layout.ranks
    numbers = shape.expert_parameters / g + shape.other_parameters
    moments = 2 / (layout.replicas if a.sharded_adam else 1)
    of_token = 3 * (shape.candidates + a.kept(shape) + shape.d_in) * a.bytes_per_value
    copies = g if layout.kind == "latents" else owners(shape, g)
    if g > 1:
        vectors = copies * (1 + 2 * a.reconstructions())
        of_token += 2 * vectors * shape.d_in * a.bytes_per_element
    return {
        "weights": numbers * a.bytes_per_weight,
        "gradients": numbers * a.bytes_per_weight,
        "Adam": numbers * moments * a.bytes_per_weight,
        "activations": a.tokens * of_token,
    }


def multiply_adds(shape: Shape, assumptions: Assumptions) -> tuple[int, int]:
    """Multiply-adds per token and each of d_in: of matrix products, and of products with survivors."""
    dead = shape.experts_per_token * assumptions.dead_of_expert(shape)
    matrix = 2 * shape.num_experts + shape.candidates + 5 * dead
    return matrix, 4 * assumptions.kept(shape) + shape.experts_per_token


def seconds(shape: Shape, layout: Layout, assumptions: Assumptions) -> dict[str, float]:
    """
    Seconds of a step: "computing", "exchange" of tokens, summing "gradients", and the whole "step".

    A GPU's links within its node and to others are used one after the other.
    """
    a, g = assumptions, layout.ranks
    sent = wire_bytes(shape, layout, a)
    imbalance = a.imbalance if layout.kind == "experts" and g > 1 else 1.0
    computing = a.tokens * imbalance * _token_seconds(shape, a)
    numbers = shape.expert_parameters / g + shape.other_parameters
    replicas = layout.replicas if a.sharded_adam else 1
    computing += _weight_seconds(numbers, replicas, a)
    gradients = _on_the_wire(
        sent.pop("gradients of weights"), _far(layout.replicas, g, a), a
    )
    everywhere = sent.pop("router and firing counts")
    gradients += _on_the_wire(everywhere, _far(layout.gpus, 1, a), a)
    gradients += 2 * a.latency * 1e-6 * (layout.gpus > 1)
    far = _far(g, 1, a) if layout.kind == "latents" else _far_of_all_to_all(g, a)
    exchange = _on_the_wire(sum(sent.values()), far, a)
    exchange += a.collectives * a.latency * 1e-6 * (g > 1)
    hidden = min(a.overlap * (exchange + gradients), computing)
    return {
        "computing": computing,
        "exchange": exchange,
        "gradients": gradients,
        "step": computing + exchange + gradients - hidden,
    }


def _token_seconds(shape: Shape, a: Assumptions) -> float:
    """Computing per token that a rank's share of the SAE brings, in the mean over ranks."""
    matrix, rows = multiply_adds(shape, a)
    flops = 2 * matrix * shape.d_in
    moved = rows * shape.d_in + _PASSES_OVER_CANDIDATES * shape.candidates
    return flops / (a.peak * 1e12 * a.peak_share) + _memory_seconds(
        moved * a.bytes_per_weight, a
    )


def _weight_seconds(numbers: float, replicas: int, a: Assumptions) -> float:
    """Computing that a step's weights bring, however many tokens there are."""
    passes = _PASSES + _PASSES_OF_ADAM / replicas
    return _memory_seconds(passes * numbers * a.bytes_per_weight, a)


def _memory_seconds(moved: float, a: Assumptions) -> float:
    return moved / (a.memory_bandwidth * 1e9 * a.memory_share)


def _on_the_wire(sent: float, far: float, a: Assumptions) -> float:
    """Seconds for bytes of which a share ``far`` goes to other nodes."""
    per_gigabyte = (1 - far) / a.within_node + far / a.between_nodes
    return sent * per_gigabyte * 1e-9 / a.link_share


def _far(size: int, stride: int, a: Assumptions) -> float:
    """
    Share of bytes that leave the node in a sum or a gathering over every ``stride``-th rank: nodes pass each
    number on once, and within a node its GPUs share that out.
    """
    nodes = size / _in_node(size, stride, a)
    return (nodes - 1) / max(size - 1, 1)


def _far_of_all_to_all(size: int, a: Assumptions) -> float:
    """Share of rows for other nodes, of those for other ranks: each owner's copy travels by itself."""
    return (size - _in_node(size, 1, a)) / max(size - 1, 1)


def _in_node(size: int, stride: int, a: Assumptions) -> int:
    """Ranks of a group that are in one node, the group having every ``stride``-th rank."""
    return max(1, min(size, a.gpus_per_node // stride))


def efficiency(shape: Shape, layout: Layout, assumptions: Assumptions) -> float:
    """
    Share of the GPUs' time that the step would need at least: that of one GPU with memory enough for the whole
    SAE and the tokens of all ranks, divided by the number of GPUs.
    """
    a = assumptions
    tokens = layout.gpus * a.tokens * _token_seconds(shape, a)
    numbers = shape.expert_parameters + shape.other_parameters
    alone = tokens + _weight_seconds(numbers, 1, a)
    return alone / layout.gpus / seconds(shape, layout, a)["step"]


def fits(shape: Shape, layout: Layout, assumptions: Assumptions) -> bool:
    """Say whether a GPU's memory is enough."""
    needed = sum(memory_bytes(shape, layout, assumptions).values())
    return needed <= assumptions.gpu_memory * 1e9


def best_layout(
    shape: Shape, kind: Kind, gpus: int, assumptions: Assumptions
) -> Layout:
    """Choose the ranks that make the fastest step of the layouts that fit, or the one of the least memory."""
    layouts = [Layout(kind, gpus, g) for g in _choices(shape, kind, gpus)]
    fitting = [layout for layout in layouts if fits(shape, layout, assumptions)]
    if fitting:
        return min(fitting, key=lambda la: seconds(shape, la, assumptions)["step"])
    return min(
        layouts, key=lambda la: sum(memory_bytes(shape, la, assumptions).values())
    )


def _choices(shape: Shape, kind: Kind, gpus: int) -> Iterator[int]:
    """Numbers of ranks among which experts or latents can be shared out evenly."""
    if kind == "data" or gpus == 1:
        yield 1
        return
    of = shape.num_experts if kind == "experts" else shape.expert_size
    shares = [g for g in range(2, gpus + 1) if gpus % g == 0 and of % g == 0]
    # With a prime number of GPUs, say, nothing can be shared out evenly.
    yield from shares or [1]

"""Starting points computed from activations."""

import torch
from jaxtyping import Float


def geometric_median(
    x: Float[torch.Tensor, "tokens d_in"],
    max_iterations: int = 100,
    tolerance: float = 1e-6,
) -> Float[torch.Tensor, " d_in"]:
    """
    The point with the smallest summed distance to all of ``x``.

    Weiszfeld's iteration from the mean. Unlike the mean it is hardly moved by the
    few tokens of enormous norm that language models have.

    Args:
        x: Points, ``[tokens, d_in]``.
        max_iterations: Iterations at most.
        tolerance: Stop when a step is shorter than this share of the mean distance.

    Returns:
        ``[d_in]``, in at least float32.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    median = x.mean(dim=0)
    for _ in range(max_iterations):
        distances = (x - median).norm(dim=-1)
        # Keeps a point that the estimate coincides with from holding it there.
        weights = 1 / distances.clamp(min=1e-3 * distances.mean() + 1e-30)
        previous, median = median, (weights @ x) / weights.sum()
        if (median - previous).norm() <= tolerance * distances.mean():
            break
    return median


def spherical_kmeans(
    x: Float[torch.Tensor, "tokens d_in"],
    num_clusters: int,
    max_iterations: int = 50,
    generator: torch.Generator | None = None,
    centers: Float[torch.Tensor, "num_clusters d_in"] | None = None,
) -> Float[torch.Tensor, "num_clusters d_in"]:
    """
    Cluster points by direction: Lloyd's algorithm with cosine similarity.

    Centres start at points drawn as in k-means++ (Arthur & Vassilvitskii 2007), or at given
    ones, whose order they keep. One that loses all its points restarts at the point that its
    own centre explains worst. Of fewer points than clusters, each is a cluster, and the other
    centres have random directions.

    Args:
        x: Points, ``[tokens, d_in]``.
        num_clusters: Number of clusters.
        max_iterations: Iterations at most; it stops when no point moves.
        generator: Randomness, on the device of ``x``; torch's own by default.
        centers: Unit-norm centres to start from, ``[num_clusters, d_in]``.

    Returns:
        Unit-norm centres, ``[num_clusters, d_in]``, in at least float32.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    missing = x.new_empty(max(0, num_clusters - len(x)), x.shape[1])
    missing.normal_(generator=generator)
    directions = torch.nn.functional.normalize(torch.cat([x, missing]), dim=-1)
    if centers is None:
        centers = _spread_out_points(directions, num_clusters, generator)
    assignment = torch.full((len(directions),), -1, device=x.device)
    for _ in range(max_iterations):
        similarity, nearest = (directions @ centers.T).max(dim=-1)
        if torch.equal(nearest, assignment):
            break
        assignment = nearest
        sums = torch.zeros_like(centers).index_add_(0, assignment, directions)
        empty = torch.bincount(assignment, minlength=num_clusters) == 0
        worst = similarity.topk(num_clusters, largest=False).indices
        sums[empty] = directions[worst[: int(empty.sum())]]
        centers = torch.nn.functional.normalize(sums, dim=-1)
    return centers


def _spread_out_points(
    directions: torch.Tensor, count: int, generator: torch.Generator | None
) -> torch.Tensor:
    """Draw points with probability proportional to the distance from those drawn."""
    distance = torch.ones_like(directions[:, 0])
    chosen = []
    for _ in range(count):
        # The floor keeps a draw possible when all that is left are duplicates.
        weights = distance.clamp(min=1e-12)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        distance = distance.minimum(1 - directions @ directions[chosen[-1]])
        distance[chosen[-1]] = 0
    return directions[chosen]

"""Geometric median and k-means."""

import pytest
import torch
from scipy.optimize import minimize

from sae_lens_scale.saes.mixture.initialization import (
    geometric_median,
    spherical_kmeans,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_geometric_median_minimises_the_summed_distance():
    x = draw(200, 4).double() + torch.tensor([1.0, -2.0, 0.0, 3.0])
    found = minimize(
        lambda c: float((x - torch.as_tensor(c)).norm(dim=-1).sum()),
        x.mean(0).numpy(),
        tol=1e-10,
    )
    torch.testing.assert_close(
        geometric_median(x), torch.as_tensor(found.x), atol=1e-4, rtol=0
    )


def test_geometric_median_ignores_a_few_huge_points():
    x = torch.cat([draw(500, 4), torch.full((5, 4), 1e4)])
    assert geometric_median(x).norm() < 0.2
    assert x.mean(0).norm() > 100


def test_geometric_median_leaves_a_point_that_the_mean_falls_on():
    x = torch.tensor([[0.0], [-3.0], [1.0], [1.0], [1.0]])
    assert x.mean() == 0
    torch.testing.assert_close(
        geometric_median(x), torch.tensor([1.0]), atol=1e-2, rtol=0
    )


def test_geometric_median_of_equal_points_is_that_point():
    x = torch.full((10, 3), 2.5)
    torch.testing.assert_close(geometric_median(x), x[0])


def test_spherical_kmeans_finds_directions_whatever_the_norms():
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(draw(6, 32), dim=-1)
    labels = torch.arange(600) % 6
    norms = draw(600, 1, seed=1).exp()
    x = (directions[labels] + 0.01 * draw(600, 32, seed=2)) * norms
    centers = spherical_kmeans(x, 6)
    torch.testing.assert_close(centers.norm(dim=-1), torch.ones(6))
    assert ((directions @ centers.T).max(dim=1).values > 0.99).all()


def test_spherical_kmeans_goes_on_from_centres_whose_order_it_keeps():
    directions = torch.nn.functional.normalize(draw(6, 32), dim=-1)
    x = directions[torch.arange(600) % 6] + 0.01 * draw(600, 32, seed=2)
    rough = directions + 0.05 * draw(6, 32, seed=3)
    rough = torch.nn.functional.normalize(rough, dim=-1)
    centers = spherical_kmeans(x, 6, centers=rough)
    assert ((directions * centers).sum(dim=-1) > 0.999).all()
    assert not ((directions * rough).sum(dim=-1) > 0.999).any()


def test_spherical_kmeans_leaves_no_cluster_empty():
    torch.manual_seed(0)
    # Two directions only, but four clusters.
    x = torch.eye(2).repeat_interleave(20, dim=0) + 1e-3 * draw(40, 2)
    centers = spherical_kmeans(x, 4)
    assert centers.isfinite().all()
    torch.testing.assert_close(centers.norm(dim=-1), torch.ones(4))


def test_spherical_kmeans_with_as_many_clusters_as_points():
    x = draw(5, 8)
    centers = spherical_kmeans(x, 5)
    similarity = torch.nn.functional.normalize(x, dim=-1) @ centers.T
    torch.testing.assert_close(similarity.max(dim=1).values, torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_starting_points_of_half_precision_are_computed_in_float32(dtype: torch.dtype):
    # Equal points have distances of 0, whose floors would be 0 in float16.
    x = torch.full((20, 4), 3.0, dtype=dtype)
    torch.testing.assert_close(geometric_median(x), x[0].float())
    centers = spherical_kmeans(x, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(centers.norm(dim=-1), torch.ones(3))

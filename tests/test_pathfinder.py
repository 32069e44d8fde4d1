"""Pathfinder's inverse Hessians are those of dense BFGS, and lead to the target of a normal."""

import pytest
import torch
from torch.distributions import MultivariateNormal

import flowvi
from flowvi.initialization import candidates
from flowvi.initialization.pathfinder import inverse_hessian, normals_along_path, update_diagonal

DIM = 5


@pytest.fixture
def precision():
    root = torch.randn(DIM, DIM)
    return root @ root.mT + torch.eye(DIM)


def path(precision, points=7):
    """A random walk, and the gradients of a normal log density along it."""
    walk = torch.randn(points, DIM).cumsum(0)
    return walk, -walk @ precision


def test_the_compact_form_is_that_of_dense_bfgs(precision):
    walk, gradients = path(precision)
    steps, changes = list(walk.diff(dim=0)), list(-gradients.diff(dim=0))
    diagonal = torch.rand(DIM) + 0.5

    inverse = inverse_hessian(diagonal, steps, changes)

    expected = diagonal.diag()
    for s, y in zip(steps, changes, strict=True):
        turn = torch.eye(DIM) - torch.outer(s, y) / (s @ y)
        expected = turn @ expected @ turn.mT + torch.outer(s, s) / (s @ y)
    torch.testing.assert_close(inverse.dense(), expected)
    torch.testing.assert_close(inverse.variances(), expected.diagonal())
    torch.testing.assert_close(inverse.times(walk[0]), expected @ walk[0])


def test_the_diagonal_learns_the_scales_of_independent_coordinates():
    scales = torch.tensor([1e-2, 1.0, 1e2, 1e-3, 10.0])
    diagonal = torch.ones(DIM)

    for _ in range(200):
        s = torch.randn(DIM) * scales
        diagonal = update_diagonal(diagonal, s, s / scales**2)

    torch.testing.assert_close(diagonal.log(), 2 * scales.log(), atol=0.3, rtol=0.0)


def test_a_path_over_a_normal_ends_at_its_mean_and_in_its_covariance(precision):
    """With as many steps as dimensions, each conjugate to those before, BFGS is exact."""
    walk, _ = path(precision, 1)
    points, directions = [walk[0]], torch.linalg.eigh(precision).eigenvectors.mT
    for direction in directions:
        points.append(points[-1] + (1 + torch.rand(())) * direction)
    points = torch.stack(points)

    last = list(normals_along_path(points, -points @ precision))[-1]

    torch.testing.assert_close(last.inverse.dense(), torch.linalg.inv(precision))
    torch.testing.assert_close(last.loc, torch.zeros(DIM), atol=1e-8, rtol=0.0)


def test_steps_without_curvature_are_passed_over():
    walk = torch.randn(4, DIM)

    assert not list(normals_along_path(walk, walk))


def test_pathfinder_competes_among_the_candidates(precision):
    normal = MultivariateNormal(torch.ones(DIM), precision_matrix=precision)
    target = flowvi.from_density(lambda v: normal.log_prob(v["x"]), {"x": flowvi.Site((DIM,))})
    generator = torch.Generator().manual_seed(0)
    judge = torch.randn(400, DIM)

    group = next(iter(candidates.candidates(target, generator)))

    found = [
        candidates.with_elbo(target, g, judge)
        for g in group.normals
        if g.name.startswith("Pathfinder")
    ]
    assert max(g.elbo for g in found) > -0.3

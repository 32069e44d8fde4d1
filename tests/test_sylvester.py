"""Sylvester, Householder and low-rank layers are the matrices of their formulas."""

import pyro.distributions.transforms as T
import pytest
import torch
from families import perturbed, same_map
from torch.autograd.functional import jacobian
from torch.distributions import LowRankMultivariateNormal

from flowvi.flows import (
    FLOWS,
    Chain,
    Diagonal,
    Flip,
    Householder,
    LowRank,
    Planar,
    Sylvester,
    TriangularSylvester,
)
from flowvi.flows.householder import Reflections
from flowvi.flows.sylvester import GramSchmidt, Reflected
from flowvi.guides import FlowGuide

CONTEXT = 3


@pytest.mark.parametrize("columns", [0, CONTEXT])
@pytest.mark.parametrize("basis", [GramSchmidt, Reflected])
def test_bases_are_orthonormal(basis, columns):
    q = perturbed(basis(6, 4, columns))(torch.randn(2, columns))

    expected = torch.eye(q.shape[-1]).expand(*q.shape[:-2], -1, -1)
    torch.testing.assert_close(q.mT @ q, expected)


def test_the_basis_moves_without_jumps():
    """QR routines flip the sign of a column when the first entry of the matrix does."""
    basis = GramSchmidt(3, 2)
    sides = []
    for first in (-1e-9, 1e-9):
        with torch.no_grad():
            basis.params.value[0] = first
        sides.append(basis(None))

    torch.testing.assert_close(*sides)


@pytest.mark.parametrize("basis", [GramSchmidt, Reflected])
def test_sylvester_is_the_formula_of_the_paper(basis):
    """y = x + Q R tanh(S Q^T x + b), determinant by the determinant of the D x D Jacobian."""
    rank = 2 if basis is GramSchmidt else 4
    layer = perturbed(Sylvester(basis(4, 2), rank), std=1.0)
    q, (r, s, b, _) = layer.basis(None), layer.inner._params(None)
    x = torch.randn(4)
    t = torch.tanh(s @ q.T @ x + b)

    y, ladj = layer(x)

    expected = torch.eye(4) + q @ r @ torch.diag(1 - t * t) @ s @ q.T
    torch.testing.assert_close(y, x + q @ r @ t)
    torch.testing.assert_close(ladj, expected.logdet())


def test_rank_one_is_planar():
    ours, planar = perturbed(Sylvester(GramSchmidt(3, 1), 1)), Planar(3)
    q, (r, s, b, _) = ours.basis(None).detach().squeeze(-1), ours.inner._params(None)
    with torch.no_grad():
        kappa, w = (r * s).squeeze(), s.squeeze() * q
        # Planar's raw u: its inner product with w gives kappa.
        along = torch.log(torch.expm1(kappa + 1)) - torch.log(torch.expm1(torch.ones(())))
        planar.params.value.copy_(torch.cat([along * w / (w @ w), w, b]))
    x = torch.randn(8, 3)

    torch.testing.assert_close(ours(x), planar(x))


def test_triangular_sylvester_is_pyros_without_rotation():
    """Theirs transposes R and S; its determinant holds where Q, two equal reflections, is I."""
    layer, theirs = perturbed(TriangularSylvester(3)), T.Sylvester(3, 2)
    with torch.no_grad():
        layer.params.value[9:18] -= torch.eye(3).flatten()  # Diagonals below 1, to be tanh.
    r, s, b, _ = layer._params(None)
    r, s = r.detach().flip(-1, -2).T, s.detach().flip(-1, -2).T
    theirs.u_unnormed.data = torch.ones(2, 3)
    theirs.R_dense.data, theirs.R_diag.data = r, torch.atanh(r.diagonal())
    theirs.S_dense.data, theirs.S_diag.data = s, torch.atanh(s.diagonal())
    theirs.b.data = b.detach().flip(-1)

    same_map(Chain([Flip(), layer, Flip()]), theirs, torch.randn(8, 3))


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_stiff_sylvester_layers_are_inverted_to_rounding(size):
    layer = TriangularSylvester(6)
    with torch.no_grad():
        layer.params.value.normal_(std=size)
    y = 10 * torch.randn(200, 6)

    x, _ = layer.inverse(y)

    torch.testing.assert_close(layer(x)[0], y, rtol=1e-9, atol=1e-9 * size)


def test_reflections_are_their_product():
    reflections = perturbed(Reflections(torch.randn(5, 3)))
    w, v = reflections(None)

    product = torch.eye(5)
    for column in v.T:
        product = product @ (torch.eye(5) - 2 * torch.outer(column, column))

    torch.testing.assert_close(torch.eye(5) - w @ v.T, product)


def test_householder_is_pyros_householder():
    """Theirs applies the first reflection first, ours last."""
    ours, theirs = perturbed(Householder(6, reflections=4)), T.Householder(6, 4)

    theirs.u_unnormed.data = ours.reflections.params.value.detach().unflatten(0, (6, 4)).T.flip(0)

    same_map(ours, theirs, torch.randn(8, 6))


def test_reflections_start_in_pairs():
    with pytest.raises(ValueError, match=r"reflections must be even.*got 3"):
        Householder(4, reflections=3)


def test_low_rank_makes_a_low_rank_covariance():
    layer = perturbed(LowRank(5, rank=2), std=1.0)
    shift, log_scale, v, *_ = layer._params(None)
    expected = LowRankMultivariateNormal(
        shift, log_scale.exp().unsqueeze(-1) * v, (2 * log_scale).exp()
    )
    guide = FlowGuide(5, layer, Diagonal(5))
    z = torch.randn(10, 5)

    moved = jacobian(lambda x: layer(x)[0], torch.randn(5))

    torch.testing.assert_close(moved @ moved.T, expected.covariance_matrix)
    torch.testing.assert_close(guide.log_prob(z), expected.log_prob(z))


def test_low_rank_leaves_its_start():
    """The directions grow although their gradient vanishes where they do."""
    target = LowRankMultivariateNormal(torch.zeros(4), 3 * torch.ones(4, 1), torch.ones(4))
    guide = FlowGuide(4, FLOWS["affine_lowrank"](4, rank=1), Diagonal(4))
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.1)

    for _ in range(60):
        optimizer.zero_grad()
        z, log_q = guide.sample((64,))
        (log_q - target.log_prob(z)).mean().backward()
        optimizer.step()

    assert (log_q - target.log_prob(z)).mean() < 0.5

"""Single layers: what is particular to each, and the same map as Pyro where Pyro has it."""

import math

import pyro.distributions.transforms as T
import pytest
import torch
from families import FLOWS, perturbed, same_map, shift_and_log_scale
from torch.autograd.functional import jacobian

from flowvi.flows import (
    AffineCoupling,
    Chain,
    Diagonal,
    Layer,
    Planar,
    Radial,
    Spline,
    Triangular,
)
from flowvi.flows.planar import solve_planar
from flowvi.flows.spline import UNIT_SLOPE

CONTEXT = 3
# With one coordinate these are what they are with many: linear, or without parameters.
AFFINE = {
    *("affine", "affine_diagonal", "affine_kronecker", "affine_lowrank", "householder"),
    *("loft", "permutation"),
}


def test_a_coupling_needs_two_coordinates():
    with pytest.raises(ValueError, match="dim must be >= 2, got 1"):
        AffineCoupling(1)


def test_a_layer_without_inverse_says_what_to_do():
    with pytest.raises(NotImplementedError, match="use gradient='total'"):
        Layer().inverse(torch.zeros(2))


@pytest.mark.parametrize("dim", [2, 5])
def test_every_coordinate_of_realnvp_depends_on_every_other(dim):
    flow = perturbed(FLOWS["realnvp"](dim))
    moved = jacobian(lambda x: flow(x)[0], torch.randn(dim))

    assert (moved.abs() > 1e-12).all()


@pytest.mark.parametrize("name", [name for name in FLOWS if name not in AFFINE])
def test_one_coordinate_gets_a_flow_that_is_not_affine(name):
    flow = perturbed(FLOWS[name](1), std=1.0)
    y = flow(torch.linspace(-3, 3, 7).unsqueeze(-1))[0].squeeze(-1)

    assert (y.diff().diff().abs() > 1e-3 * y.diff().abs().max()).any()
    assert (y.diff() > 0).all() or (y.diff() < 0).all()


@pytest.mark.parametrize("slope", [1e-3, 0.5, 1.0, 2.0, 50.0, 1e6])
def test_planar_root_is_found_to_rounding(slope):
    a = torch.cat([torch.zeros(1), 10.0 ** torch.linspace(-30, 4, 400), torch.linspace(0, 40, 999)])
    c = a + (slope - 1) * torch.tanh(a)

    root = solve_planar(torch.cat([c, -c]), torch.tensor(slope))

    torch.testing.assert_close(root, torch.cat([a, -a]), rtol=1e-9, atol=1e-30)


def test_triangular_becomes_the_gaussian_it_is_set_to():
    loc, scale_tril = torch.randn(3), torch.linalg.cholesky(torch.eye(3) + torch.ones(3, 3))
    layer = perturbed(Triangular(3, CONTEXT))
    x = torch.randn(6, 3)

    layer.set_(loc, scale_tril)
    y, ladj = layer(x, torch.randn(CONTEXT))

    torch.testing.assert_close(y, loc + x @ scale_tril.T)
    torch.testing.assert_close(ladj, scale_tril.logdet().expand(6))


def test_diagonal_is_set_to_the_conditional_scales():
    covariance = torch.tensor([[2.0, 1.2], [1.2, 1.0]])
    layer = perturbed(Diagonal(2))

    layer.set_(torch.ones(2), torch.linalg.cholesky(covariance))

    expected = torch.linalg.inv(covariance).diagonal().rsqrt()
    torch.testing.assert_close(layer(torch.zeros(2))[0], torch.ones(2))
    torch.testing.assert_close(layer(torch.ones(2))[0], 1 + expected)


def test_planar_is_pyros_planar():
    """Ours is theirs with u shifted so that zero is the identity."""
    ours, theirs = perturbed(Planar(3)), T.Planar(3)

    u, w, b = ours.params.value.detach().split([3, 3, 1])
    theirs.u.data = u + math.log(math.e - 1) * w / w.square().sum()
    theirs.w.data, theirs.bias.data = w, b

    same_map(ours, theirs, torch.randn(8, 3))


def test_radial_is_pyros_radial():
    ours, theirs = perturbed(Radial(3)), T.Radial(3)

    values = ours.params.value.detach().split([3, 1, 1])
    theirs.x0.data, theirs.alpha_prime.data, theirs.beta_prime.data = values

    same_map(ours, theirs, torch.randn(8, 3))


def test_coupling_is_pyros_coupling():
    ours = perturbed(AffineCoupling(5))
    theirs = T.AffineCoupling(2, lambda a: shift_and_log_scale(ours._params(a, None)))

    same_map(ours, theirs, torch.randn(8, 5))


def test_spline_is_pyros_spline():
    """Up to the first and last bin, at whose ends their slope is 0.999."""
    ours, theirs = perturbed(Spline(3)), T.Spline(3, bound=5.0, order="quadratic")

    values = ours.params.value.detach().unflatten(0, (-1, 3)).T.split([8, 8, 7], dim=1)
    theirs.unnormalized_widths.data, theirs.unnormalized_heights.data = values[:2]
    theirs.unnormalized_derivatives.data = values[2] + UNIT_SLOPE

    x = 4 * torch.rand(50, 3) - 2
    y, ladj = ours(x)
    torch.testing.assert_close(y, theirs(x))
    torch.testing.assert_close(ladj, theirs.log_abs_det_jacobian(x, theirs(x)).sum(-1))


def test_triangular_is_a_lower_cholesky_affine():
    ours = perturbed(Triangular(4))
    loc = ours(torch.zeros(4))[0].detach()
    scale_tril = jacobian(lambda x: ours(x)[0], torch.zeros(4))

    same_map(ours, T.LowerCholeskyAffine(loc, scale_tril), torch.randn(8, 4))


def test_a_chain_of_nothing_is_the_identity():
    x = torch.randn(4, 3)
    y, ladj = Chain([])(x)

    assert torch.equal(y, x) and torch.equal(ladj, torch.zeros(4))

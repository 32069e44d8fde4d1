"""Foreign transforms become layers whose gradients belong to the call that was made."""

import copy

import pyro.distributions.transforms as T
import pytest
import torch
from families import perturbed
from torch.autograd.functional import jacobian
from torch.distributions import transforms as torch_transforms

from flowvi.flows import Chain, FromTransform
from flowvi.guides import FlowGuide
from flowvi.objectives import elbo

INVERTIBLE = {
    "affine": lambda: T.AffineTransform(torch.ones(3), 2 * torch.ones(3), cache_size=1),
    "affine_autoregressive": lambda: T.affine_autoregressive(3),
    "affine_autoregressive_backwards": lambda: T.affine_autoregressive(3).inv,
    "affine_coupling": lambda: T.affine_coupling(3),
    "composed": lambda: T.ComposeTransformModule([T.Spline(3), T.affine_coupling(3)]),
    "householder": lambda: T.Householder(3, 2),
    "matrix_exponential": lambda: T.matrix_exponential(3),
    "mixed": lambda: T.ComposeTransform(
        [T.ExpTransform(cache_size=1), T.AffineTransform(0.0, 2.0), T.ExpTransform().inv]
    ),
    "spline": lambda: T.Spline(3),
    "spline_autoregressive": lambda: T.spline_autoregressive(3),
    "spline_coupling": lambda: T.spline_coupling(3),
}
ONE_WAY = {
    "block_autoregressive": lambda: T.block_autoregressive(3),
    "neural_autoregressive": lambda: T.neural_autoregressive(3),
    "planar": lambda: T.Planar(3),
    "polynomial": lambda: T.polynomial(3),
    "radial": lambda: T.Radial(3),
}
ALL = {**INVERTIBLE, **ONE_WAY}


@pytest.mark.parametrize("name", ALL)
def test_ladj_matches_autograd(name):
    layer = FromTransform(ALL[name]())
    x = torch.randn(3)

    layer(torch.randn(3))
    _, ladj = layer(x)
    expected = torch.linalg.slogdet(jacobian(lambda x: layer(x)[0], x)).logabsdet

    torch.testing.assert_close(ladj, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", INVERTIBLE)
def test_inverse_undoes_forward(name):
    layer = FromTransform(INVERTIBLE[name]())
    x = torch.randn(7, 3)

    y, ladj = layer(x)
    x_back, inverse_ladj = layer.inverse(y)

    torch.testing.assert_close(x_back, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inverse_ladj, -ladj, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", INVERTIBLE)
def test_the_inverse_of_a_draw_is_solved_for_anew(name):
    """A cache hands back the x that the draw was made of, in which y does not appear."""
    layer = FromTransform(INVERTIBLE[name]())

    def gradient(y):
        x, ladj = layer.inverse(y)
        return torch.autograd.grad(x.sum() + ladj.sum(), y)[0]

    y, _ = layer(torch.randn(5, 3, requires_grad=True))

    torch.testing.assert_close(gradient(y), gradient(y.detach().requires_grad_()))


@pytest.mark.parametrize("name", INVERTIBLE)
def test_the_path_gradient_lands(name):
    """Zero to the accuracy of the transform's own inverse."""
    guide = FlowGuide(3, FromTransform(INVERTIBLE[name]()))
    target = copy.deepcopy(guide)

    bound = elbo(4)(target.log_prob, guide).bound
    zero = torch.autograd.grad(bound, list(guide.parameters()), allow_unused=True)

    assert all(g is None or g.abs().max() < 1e-4 for g in zero)


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_remembered(name):
    """The same tensor under other parameters gives what a fresh transform gives."""
    layer = FromTransform(ALL[name]())
    x = torch.randn(5, 3)

    layer(x)
    perturbed(layer, std=0.1)
    fresh = copy.deepcopy(layer)

    torch.testing.assert_close(layer(x), fresh(x.clone()), rtol=0, atol=0)


@pytest.mark.parametrize("name", ONE_WAY)
def test_a_transform_without_inverse_says_what_to_do(name):
    layer = FromTransform(ONE_WAY[name]())

    with pytest.raises(NotImplementedError, match="has no inverse; use gradient='total'"):
        layer.inverse(torch.randn(3))


def test_a_flow_without_inverse_trains_with_the_total_gradient():
    guide = FlowGuide(3, FromTransform(T.block_autoregressive(3)))

    bound = elbo(8, "total")(lambda z: -z.square().sum(-1), guide).bound
    found = torch.autograd.grad(bound, list(guide.flow.parameters()))

    assert all(g.isfinite().all() for g in found) and any(g.abs().max() > 0 for g in found)


def test_conditional_transforms_take_the_context():
    layer = FromTransform(T.conditional_affine_autoregressive(3, 2))
    context, x = torch.randn(5, 2), torch.randn(4, 5, 3)

    y, ladj = layer(x, context)
    row, row_ladj = layer(x[:, 1], context[1])

    torch.testing.assert_close(y[:, 1], row)
    torch.testing.assert_close(ladj[:, 1], row_ladj)
    torch.testing.assert_close(layer.inverse(y, context)[0], x)
    with pytest.raises(ValueError, match="pass context="):
        layer(x)


def test_adapted_layers_chain_and_train():
    flow = Chain([FromTransform(T.affine_coupling(3)), FromTransform(T.Spline(3))])

    assert len(list(flow.parameters())) > 4


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (torch_transforms.AbsTransform(), "AbsTransform is not a bijection"),
        (torch_transforms.ExpTransform(), r"ExpTransform maps to GreaterThan.*R\^D"),
        (torch_transforms.ReshapeTransform((4,), (2, 2)), "ReshapeTransform maps to"),
        (torch_transforms.StickBreakingTransform(), "StickBreakingTransform maps to Simplex"),
    ],
    ids=["not a bijection", "to a half line", "to matrices", "to a simplex"],
)
def test_what_is_no_flow_is_refused(transform, message):
    with pytest.raises(ValueError, match=message):
        FromTransform(transform)

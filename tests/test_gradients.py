"""Reduced-variance gradients land and are unbiased."""

import copy

import pytest
import torch
from families import ALPHAS, NAMES, correlated, gradients, make_guide, perturbed
from torch.func import functional_call

from flowvi.flows import planar
from flowvi.guides import FlowGuide, MeanField
from flowvi.objectives import Renyi, iwelbo


@pytest.fixture
def normal():
    return correlated()


@pytest.mark.parametrize("dim", [1, 4])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", NAMES)
def test_dreg_lands(name, alpha, dim):
    """When q equals p every draw gives a zero gradient, not only their mean."""
    guide = perturbed(make_guide(name, dim))
    target = copy.deepcopy(guide)

    bound, _ = Renyi(alpha, particles=1)(target.log_prob, guide, repeats=(3,))

    for single in bound:
        zero = torch.autograd.grad(single, list(guide.parameters()), retain_graph=True)
        assert all(g.abs().max() < 1e-9 for g in zero)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", NAMES)
def test_dreg_lands_with_a_differentiable_context(name, alpha):
    guide = perturbed(make_guide(name, 3, 2))
    target = copy.deepcopy(guide)
    context = torch.randn(6, 2, requires_grad=True)

    bound, _ = Renyi(alpha, particles=5)(
        lambda z: target.log_prob(z, context.detach()), guide, context
    )
    zero = torch.autograd.grad(bound.sum(), [context, *guide.parameters()])

    assert all(g.abs().max() < 1e-9 for g in zero)


# Unbiasedness.


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("depth", [0, 2])
def test_dreg_is_unbiased(depth, alpha, normal):
    """Both estimators agree within four standard errors of their difference."""
    guide = perturbed(FlowGuide(2, planar(2, depth=depth)))

    def one(kind):
        bound, _ = Renyi(alpha, 4, kind)(normal.log_prob, guide, repeats=(1000,))
        return gradients(bound.mean(), guide)

    difference = torch.stack([one("dreg") - one("total") for _ in range(40)])
    standard_error = difference.std(0) / len(difference) ** 0.5

    assert (difference.mean(0).abs() < 4 * standard_error + 1e-12).all()


@pytest.mark.parametrize("alpha", [0.5, 0.0])
def test_the_path_gradient_with_v_alone_would_be_biased(alpha, normal):
    """The unbiasedness test can tell v from alpha v + (1 - alpha) v^2."""
    guide = MeanField(2)
    fixed = copy.deepcopy(guide).requires_grad_(False)

    def one(kind):
        z, log_q = guide.sample((4, 1000))
        path = fixed.log_prob(z)
        log_w = normal.log_prob(z) - (path if kind == "v" else log_q)
        if kind == "total":
            return gradients(Renyi(alpha, 4).bound(log_w).mean(), guide)
        v = torch.softmax((1 - alpha) * log_w.detach(), dim=0)
        return gradients((v * log_w).sum(0).mean(), guide)

    difference = torch.stack([one("v") - one("total") for _ in range(40)])
    standard_error = difference.std(0) / len(difference) ** 0.5

    assert (difference.mean(0).abs() > 6 * standard_error).any()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_models_own_parameters_see_the_same_gradient(alpha, normal):
    """Theirs is the gradient v, whatever the estimator of the guide's."""
    guide = MeanField(2)
    shift = torch.zeros(2, requires_grad=True)

    def one(kind):
        torch.manual_seed(5)
        bound, _ = Renyi(alpha, 8, kind)(lambda z: normal.log_prob(z - shift), guide)
        return torch.autograd.grad(bound, shift)[0]

    torch.testing.assert_close(one("dreg"), one("total"))


@pytest.mark.parametrize("name", NAMES)
def test_a_bound_of_parameters_that_are_functions_of_others(name):
    """One flat vector may stand for all parameters, by functional_call."""

    class Bound(torch.nn.Module):
        def __init__(self, guide):
            super().__init__()
            self.guide = guide

        def forward(self):
            torch.manual_seed(1)
            return iwelbo(4)(lambda z: -z.pow(4).sum(-1), self.guide).bound

    module = Bound(perturbed(make_guide(name, 2)))
    flat = torch.nn.utils.parameters_to_vector(module.parameters()).detach().requires_grad_()
    pieces, views = flat.split([p.numel() for p in module.parameters()]), {}
    for (key, p), piece in zip(module.named_parameters(), pieces, strict=True):
        views[key] = piece.view_as(p)

    by_vector = torch.autograd.grad(functional_call(module, views, ()), flat)[0]

    found = torch.autograd.grad(module(), list(module.parameters()))
    torch.testing.assert_close(by_vector, torch.cat([g.flatten() for g in found]))

"""A mixture of guides is drawn in strata: its bounds are exact, and its gradients land."""

import copy
import math

import pytest
import torch
from families import ALPHAS, gradients, perturbed
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from flowvi.flows import planar
from flowvi.guides import FlowGuide, FullRank, MeanField, MixtureGuide
from flowvi.guides.mixture_overlap import overlap
from flowvi.guides.registry import mixture
from flowvi.objectives import Renyi, elbo, iwelbo

CONTEXT = 2


def gaussians(locs, scale=1.0, logits=None):
    """A mixture of Gaussians of equal scale."""
    guide = MixtureGuide([FullRank(len(loc)) for loc in locs], logits)
    guide.start_components([(torch.tensor(loc), scale * torch.eye(len(loc))) for loc in locs])
    return guide


@pytest.fixture
def far():
    """Three components that never meet, with weights 0.5, 0.3 and 0.2."""
    return gaussians([[-1e3, 0.0], [0.0, 0.0], [1e3, 0.0]], logits=torch.tensor([5.0, 3, 2]).log())


def near():
    """Three different components that overlap, of two kinds."""
    guide = MixtureGuide([FullRank(2), MeanField(2), FlowGuide(2, planar(2, depth=2))])
    return perturbed(guide, std=0.5)


def test_the_density_is_that_of_a_mixture():
    locs = torch.randn(3, 2)
    guide = gaussians(locs.tolist(), scale=0.7, logits=torch.randn(3))
    components = MultivariateNormal(locs, 0.49 * torch.eye(2))
    expected = MixtureSameFamily(Categorical(logits=guide.logits.value), components)
    z = torch.randn(10, 2)

    torch.testing.assert_close(guide.log_prob(z), expected.log_prob(z))


def test_components_are_picked_by_their_weights(far):
    z, _ = far.sample((4000,))
    share = torch.stack([(z[:, 0] / 1e3).round() == m for m in (-1, 0, 1)]).double().mean(1)

    error = (share * (1 - share) / len(z)).sqrt()

    assert ((share - far.log_weights().exp()).abs() < 4 * error).all()


@pytest.mark.parametrize("kind", ["total", "dreg"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_bounds_of_components_that_never_meet_are_exact(alpha, kind, far):
    """Only the weights differ from the target's: the bound is a Renyi divergence of weights."""
    rho = torch.tensor([0.1, 0.2, 0.7])
    target = gaussians([[-1e3, 0.0], [0.0, 0.0], [1e3, 0.0]], logits=rho.log())
    log_weights = far.log_weights()

    bound, _ = Renyi(alpha, 2, kind)(target.log_prob, far)
    expected = Renyi(alpha).bound(rho.log() - log_weights, log_weights)

    torch.testing.assert_close(bound, expected)
    if kind == "dreg":
        found, exact = (
            torch.autograd.grad(b, far.logits.value, retain_graph=True)[0]
            for b in (bound, Renyi(alpha).bound(rho.log() - log_weights, log_weights))
        )
        torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients_land_whatever_the_evidence(alpha):
    """Weights included, for every set of strata, with a scaled target."""
    guide = near()
    target = copy.deepcopy(guide)

    bound, log_w = Renyi(alpha, particles=2)(lambda z: target.log_prob(z) + 7, guide, repeats=(3,))

    assert log_w.shape == (6, 3)
    for single in bound:
        torch.testing.assert_close(single, torch.tensor(7.0))
        zero = torch.autograd.grad(single, list(guide.parameters()), retain_graph=True)
        assert all(g.abs().max() < 1e-9 for g in zero)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_reduced_variance_gradients_are_unbiased(alpha):
    """Both estimators agree within four standard errors of their difference."""
    target = MultivariateNormal(torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 0.6], [0.6, 1.0]]))
    guide = near()

    def one(kind):
        bound, _ = Renyi(alpha, 2, kind)(target.log_prob, guide, repeats=(1000,))
        return gradients(bound.mean(), guide)

    difference = torch.stack([one("dreg") - one("total") for _ in range(40)])
    standard_error = difference.std(0) / len(difference) ** 0.5

    assert (difference.mean(0).abs() < 4 * standard_error + 1e-12).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_conditional_weights_get_unbiased_gradients(alpha):
    target = MultivariateNormal(torch.zeros(1), torch.eye(1))
    guide = perturbed(MixtureGuide([FullRank(1, CONTEXT), FullRank(1, CONTEXT)], None, CONTEXT))
    context = torch.randn(3, CONTEXT, requires_grad=True)

    def one(kind):
        bound, _ = Renyi(alpha, 2, kind)(target.log_prob, guide, context, repeats=(1000,))
        assert bound.shape == (1000, 3)
        leaves = [context, *guide.parameters()]
        found = torch.autograd.grad(bound.mean(0).sum(), leaves)
        return torch.cat([g.flatten() for g in found])

    difference = torch.stack([one("dreg") - one("total") for _ in range(40)])
    standard_error = difference.std(0) / len(difference) ** 0.5

    assert (difference.mean(0).abs() < 4 * standard_error + 1e-12).all()


def test_bounds_in_strata_lie_below_the_evidence():
    """ELBO <= IW bound <= log evidence, and the weights average to the evidence."""
    target = MultivariateNormal(torch.zeros(2), 4 * torch.eye(2))
    guide = gaussians([[-1.0, 0.0], [1.0, 0.0]], scale=2.0, logits=torch.tensor([0.3, 0.7]).log())

    def one(objective):
        bound, log_w = objective(lambda z: target.log_prob(z) + 0.5, guide, repeats=(4000,))
        return bound.detach(), log_w

    (lower, _), (tight, log_w) = one(elbo(4)), one(iwelbo(4))
    weight = log_w.exp().mean(0)

    assert lower.mean() < tight.mean() < 0.5 + 4 * tight.std() / 4000**0.5
    assert abs(weight.mean() - math.exp(0.5)) < 4 * weight.std() / 4000**0.5


def test_a_mixture_finds_the_weights_of_two_modes():
    target = gaussians([[-4.0], [4.0]], scale=0.5, logits=torch.tensor([0.3, 0.7]).log())
    guide = gaussians([[-3.0], [3.0]])
    optimiser = torch.optim.Adam(guide.parameters(), lr=0.05)

    for _ in range(200):
        optimiser.zero_grad()
        (-elbo(8)(target.log_prob, guide).bound).backward()
        optimiser.step()

    torch.testing.assert_close(
        guide.log_weights().exp(), torch.tensor([0.3, 0.7]), rtol=0, atol=1e-3
    )


def test_overlap_is_bhattacharyyas_coefficient():
    guide = gaussians([[0.0], [1.0], [4.0]])
    locs = torch.tensor([0.0, 1.0, 4.0])
    exact = (-(locs[:, None] - locs).square() / 8).exp().numpy()

    found = overlap(guide, 4000)

    assert (abs(found.coefficient - exact) <= 4 * found.error).all()
    assert found.collapsed == [] and found.unused == []


def test_collapsed_and_unused_components_are_reported():
    guide = gaussians([[0.0], [0.1], [50.0]], logits=torch.tensor([1.0, 1.0, 1e-4]).log())

    found = overlap(guide)

    assert found.collapsed == [(0, 1)] and found.unused == [2]
    assert "Components 0 and 1 have collapsed onto each other" in str(found)
    assert "Component 2 has almost no weight" in str(found)


def test_overlap_averages_over_rows():
    guide = MixtureGuide([FullRank(1, CONTEXT), FullRank(1, CONTEXT)], context_dim=CONTEXT)

    found = overlap(perturbed(guide), 100, torch.randn(5, CONTEXT))

    assert found.coefficient.shape == (2, 2) and abs(found.weights.sum() - 1) < 1e-12


def test_the_usual_mixture_is_of_flows():
    guide = mixture(2)

    assert len(guide.components) == 3 and isinstance(guide.components[0], FlowGuide)


def test_starts_must_match_the_components():
    with pytest.raises(ValueError, match="2 components needs as many starts; got 1"):
        mixture(2, components=2, component="fullrank").start_components(
            [(torch.zeros(2), torch.eye(2))]
        )


def test_components_must_agree_on_their_length():
    with pytest.raises(ValueError, match=r"components of one D; got components of D = \[1, 2\]"):
        MixtureGuide([FullRank(1), FullRank(2)])

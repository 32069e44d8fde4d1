"""Every objective has the value of its bound, whatever its gradient."""

import math
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from families import ALPHAS, NAMES, correlated, gradients, half_line, make_guide, perturbed
from pyro.distributions import TorchDistribution
from torch.distributions import MultivariateNormal, constraints

from flowvi.guides import FullRank, Guide, MeanField
from flowvi.objectives import OBJECTIVES, Renyi, elbo, iwelbo, renyi


@pytest.fixture
def normal():
    return correlated()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", NAMES)
def test_all_gradient_kinds_have_the_same_value_to_the_bit(name, alpha):
    guide = perturbed(make_guide(name, 2, 3))
    context = torch.randn(4, 3)

    def one(kind):
        torch.manual_seed(7)
        return Renyi(alpha, 6, kind)(lambda z: -z.square().sum(-1), guide, context)

    total, dreg = one("total"), one("dreg")

    assert torch.equal(total.bound, dreg.bound) and torch.equal(total.log_w, dreg.log_w)
    # A mixture has six draws from each of its components.
    assert total.bound.shape == (4,) and total.log_w.shape in ((6, 4), (12, 4))


@pytest.mark.parametrize("name", NAMES)
def test_bounds_are_ordered(name):
    """ELBO <= L_0.5 <= IW-ELBO on the same draws; the last is the log evidence, within errors."""
    target = MultivariateNormal(torch.ones(2), torch.eye(2))
    log_evidence = 0.7  # target scaled by e^0.7
    with torch.no_grad():
        _, log_w = Renyi(0.0, 50_000, "total")(
            lambda z: target.log_prob(z) + log_evidence, make_guide(name, 2)
        )

    lower, half, iw = (Renyi(a).bound(log_w).item() for a in ALPHAS)

    weights = (log_w - log_evidence).exp()
    error = weights.std().item() / len(weights) ** 0.5
    assert lower < half < iw
    assert abs(iw - log_evidence) < 4.5 * error
    assert error < 0.02


def test_the_evidence_of_a_conjugate_normal_is_exact():
    """mu ~ N(0, 1), x_i ~ N(mu, 1): with the exact posterior each weight is the evidence."""
    x = torch.randn(10)
    covariance = torch.eye(10) + torch.ones(10, 10)
    expected = MultivariateNormal(torch.zeros(10), covariance).log_prob(x)
    guide = FullRank(1)
    guide.start(x.sum().reshape(1) / 11, torch.full((1, 1), 11**-0.5))

    def log_p(z):
        return dist.Normal(0.0, 1.0).log_prob(z[..., 0]) + dist.Normal(z, 1.0).log_prob(x).sum(-1)

    for objective in (elbo(), renyi(0.5, 4), iwelbo(16)):
        bound, log_w = objective(log_p, guide)
        torch.testing.assert_close(bound, expected)
        torch.testing.assert_close(log_w, expected.expand_as(log_w))


class AsPyro(TorchDistribution):
    """Our guide as a Pyro distribution, drawing the same noise."""

    support = constraints.real_vector
    arg_constraints: ClassVar[dict] = {}
    has_rsample = True

    def __init__(self, guide):
        self.guide = guide
        super().__init__(torch.Size(), torch.Size([guide.dim]), validate_args=False)

    def rsample(self, sample_shape=()):
        return self.guide.sample(tuple(sample_shape)).z

    def log_prob(self, z):
        return self.guide.log_prob(z)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "mixture"])
def test_our_elbo_is_pyros_trace_elbo(name, normal):
    """Same noise, same value, same total gradient."""
    flow = perturbed(make_guide(name, 2))

    def model():
        pyro.sample("z", dist.MultivariateNormal(normal.loc, normal.covariance_matrix))

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", AsPyro(flow))

    torch.manual_seed(3)
    theirs = -pyro.infer.Trace_ELBO().differentiable_loss(model, guide)
    torch.manual_seed(3)
    ours = elbo(1, "total")(normal.log_prob, flow).bound

    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, flow), gradients(theirs, flow))


@pytest.mark.parametrize("kind", ["total", "dreg"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_bounds_of_rows_are_independent(alpha, kind):
    """A sum of bounds is the bound of a product: rows do not mix."""
    guide = perturbed(make_guide("affine", 2, 3))
    context = torch.randn(4, 3)
    weight = torch.tensor([1.0, 0.0, 0.0, 0.0])

    torch.manual_seed(2)
    bound, _ = Renyi(alpha, 5, kind)(lambda z: -z.pow(4).sum(-1), guide, context)
    alone = gradients((weight * bound).sum(), guide)
    torch.manual_seed(2)
    bound, _ = Renyi(alpha, 5, kind)(
        lambda z: -z.pow(4).sum(-1) * torch.tensor([1.0, 9.0, 9.0, 9.0]), guide, context
    )

    torch.testing.assert_close(gradients((weight * bound).sum(), guide), alone)


@pytest.mark.parametrize("kind", ["total", "dreg"])
@pytest.mark.parametrize("alpha", [0.5, 0.0])
def test_draws_outside_the_support_do_not_poison(alpha, kind):
    guide = perturbed(FullRank(2))

    bound, log_w = Renyi(alpha, 64, kind)(half_line, guide)

    assert log_w.isneginf().any()
    assert bound.isfinite() and gradients(bound, guide).isfinite().all()


@pytest.mark.parametrize("alpha", [0.5, 0.0])
def test_dreg_is_unbiased_with_draws_outside_the_support(alpha):
    """The density falls to zero continuously at its border, so that the gradient exists."""
    guide = FullRank(1)
    guide.start(torch.ones(1), torch.eye(1))

    def one(kind):
        bound, _ = Renyi(alpha, 16, kind)(half_line, guide, repeats=(500,))
        return gradients(bound.mean(), guide)

    difference = torch.stack([one("dreg") - one("total") for _ in range(40)])
    standard_error = difference.std(0) / len(difference) ** 0.5

    assert (difference.mean(0).abs() < 4 * standard_error + 1e-12).all()


@pytest.mark.parametrize("kind", ["total", "dreg"])
def test_the_elbo_of_a_guide_that_leaves_the_support_is_minus_infinity(kind):
    bound, _ = elbo(64, kind)(half_line, FullRank(2))

    assert bound == -math.inf


@pytest.mark.parametrize("alpha", ALPHAS)
def test_no_draw_inside_the_support_is_minus_infinity(alpha):
    guide = FullRank(2)
    guide.start(torch.tensor([-100.0, 0.0]), torch.eye(2))

    assert Renyi(alpha, 8)(half_line, guide).bound == -math.inf


@pytest.mark.parametrize("kind", ["total", "dreg"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_nan_shows(alpha, kind):
    bound, _ = Renyi(alpha, 8, kind)(lambda z: z[..., 0].log(), MeanField(1))

    assert bound.isnan()


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_outside_the_family_is_refused(alpha):
    with pytest.raises(ValueError, match=rf"alpha must lie in \[0, 1\] .* got {alpha}"):
        renyi(alpha)


def test_no_particles_are_refused():
    with pytest.raises(ValueError, match="particles must be a whole number of at least 1; got 0"):
        iwelbo(0)


def test_stl_is_dreg_at_alpha_one_and_refused_below():
    assert elbo(gradient="stl").gradient == "stl"
    with pytest.raises(ValueError, match=r"biased for alpha < 1; got alpha = 0.5.*'dreg'"):
        renyi(0.5, gradient="stl")


def test_unknown_gradients_list_the_choices():
    with pytest.raises(ValueError, match=r"No gradient named 'path'.*Choose from dreg, stl, total"):
        elbo(gradient="path")


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in ("forward_kl", "renyi")])
def test_objectives_of_the_registry_need_no_arguments(name):
    bound, log_w = OBJECTIVES[name]()(lambda z: -z.square().sum(-1), MeanField(2))

    assert bound.isfinite() and bound.shape == () and log_w.dim() == 1


def test_a_guide_without_parameters_is_scored_as_well():
    class Fixed(Guide):
        dim = 2

        def sample(self, shape, context=None):
            return FullRank(2).eval().requires_grad_(False).sample(shape)

        def log_prob(self, z, context=None):
            return FullRank(2).requires_grad_(False).log_prob(z)

    assert iwelbo(4)(lambda z: -z.square().sum(-1), Fixed()).bound.isfinite()

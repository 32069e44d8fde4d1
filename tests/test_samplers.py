"""What is drawn from a prior has the density that the prior gives it."""

import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from flowvi.targets import from_pyro

DRAWS = 4000


def _spd(d: int) -> Tensor:
    return torch.eye(d) + 0.3


DISTRIBUTIONS: dict[str, Callable[[], dist.Distribution]] = {
    "Normal": lambda: dist.Normal(1.0, 2.0),
    "StudentT": lambda: dist.StudentT(8.0, 1.0, 2.0),
    "Laplace": lambda: dist.Laplace(1.0, 2.0),
    "Logistic": lambda: dist.Logistic(1.0, 2.0),
    "Gumbel": lambda: dist.Gumbel(1.0, 2.0),
    "HalfNormal": lambda: dist.HalfNormal(2.0),
    "HalfCauchy": lambda: dist.HalfCauchy(2.0),
    "Exponential": lambda: dist.Exponential(2.0),
    "Gamma": lambda: dist.Gamma(2.5, 1.5),
    "InverseGamma": lambda: dist.InverseGamma(6.0, 3.0),
    "LogNormal": lambda: dist.LogNormal(0.5, 0.4),
    "Weibull": lambda: dist.Weibull(2.0, 1.5),
    "Chi2": lambda: dist.Chi2(4.0),
    "Beta": lambda: dist.Beta(2.0, 3.0),
    "Kumaraswamy": lambda: dist.Kumaraswamy(2.0, 3.0),
    "Uniform": lambda: dist.Uniform(-1.0, 3.0),
    "Dirichlet": lambda: dist.Dirichlet(torch.tensor([1.5, 2.0, 3.0])),
    "MultivariateNormal": lambda: dist.MultivariateNormal(torch.zeros(2), _spd(2)),
    "LowRank": lambda: dist.LowRankMultivariateNormal(
        torch.zeros(3), torch.ones(3, 1), torch.ones(3)
    ),
    "AsymmetricLaplace": lambda: dist.AsymmetricLaplace(0.0, 1.0, 0.7),
    "a transform": lambda: dist.TransformedDistribution(
        dist.Normal(0.0, 1.0), [dist.transforms.SigmoidTransform()]
    ),
    "MixtureSameFamily": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])), dist.Normal(torch.tensor([-1.0, 2.0]), 1.0)
    ),
    **{
        f"LKJCholesky {d} {eta}": lambda d=d, eta=eta: dist.LKJCholesky(d, eta)
        for d in (2, 3, 5)
        for eta in (1.0, 2.0)
    },
    "LKJ": lambda: dist.LKJ(4, 2.0),
    "Wishart": lambda: dist.Wishart(torch.tensor(6.0), _spd(3)),
    "VonMises": lambda: dist.VonMises(0.5, 3.0),
    "Pareto": lambda: dist.Pareto(1.5, 4.0),
    "FisherSnedecor": lambda: dist.FisherSnedecor(6.0, 12.0),
    "LogisticNormal": lambda: dist.LogisticNormal(torch.zeros(2), torch.ones(2)),
    "MultivariateStudentT": lambda: dist.MultivariateStudentT(8.0, torch.zeros(2), _spd(2)),
    "SoftLaplace": lambda: dist.SoftLaplace(0.0, 1.0),
    "SoftAsymmetricLaplace": lambda: dist.SoftAsymmetricLaplace(0.0, 1.0, 0.7, 0.5),
    "SkewLogistic": lambda: dist.SkewLogistic(0.0, 1.0, 1.5),
    "RelaxedBernoulli": lambda: dist.RelaxedBernoulli(torch.tensor(0.8), torch.tensor(0.3)),
    "RelaxedOneHotCategorical": lambda: dist.RelaxedOneHotCategorical(
        torch.tensor(1.0), torch.tensor([0.2, 0.3, 0.5])
    ),
    "ContinuousBernoulli": lambda: dist.ContinuousBernoulli(torch.tensor(0.3)),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.filterwarnings("ignore:Simulating one draw at a time")  # VonMises rejects
def test_draws_have_their_density(name):
    r"""Stein's identity for the density of the unconstrained draws.

    For smooth functions f that are bounded with their gradients,
    :math:`E[f'(z_i) + f(z_i) \partial_i \log p(z)] = 0` under p, and p alone.
    """

    def model() -> None:
        pyro.sample("x", DISTRIBUTIONS[name]())

    target = from_pyro(model)
    draws = target.prior(DRAWS, seed=1)
    z = target.unconstrain(draws)
    z = z[z.isfinite().all(-1)].requires_grad_()
    assert len(z) > 0.999 * DRAWS
    (score,) = torch.autograd.grad(target.log_prob(z).sum(), z)
    z, score = z.detach().numpy(), score.numpy()
    centre, width = np.median(z, 0), z.std(0)
    found = []
    for shift in (-1.0, 0.0, 1.0):
        u = (z - centre) / width + shift
        f, slope = np.tanh(u), (1 - np.tanh(u) ** 2) / width
        found.append(slope + f * score)

    values = np.concatenate(found, 1)
    errors = values.mean(0) / (values.std(0) / math.sqrt(len(values)))
    # Of the 350 or so numbers of all distributions, one beyond 4.5 is had by chance in 400.
    assert np.abs(errors).max() < 4.5


@pytest.mark.parametrize("dim", [3, 4])
def test_all_correlations_of_an_lkj_vary_alike(dim):
    """Each is a Beta(b, b) on (-1, 1) with b = eta + d / 2 - 1, of variance 1 / (2 b + 1)."""

    def model() -> None:
        pyro.sample("c", dist.LKJCholesky(dim, 2.0))

    factor = torch.as_tensor(from_pyro(model).prior(20_000, seed=0)["c"])
    correlation = factor @ factor.mT
    rows, columns = np.tril_indices(dim, -1)
    found = correlation[:, rows, columns].var(0)

    expected = 1 / (2 * (2.0 + dim / 2 - 1) + 1)
    # The variance of a variance estimate is at most 2 v^2 / n for these light tails.
    error = expected * math.sqrt(2 / 20_000)
    assert (found - expected).abs().max() < 4.5 * error


def test_the_users_distribution_is_left_as_it_was():
    prior = dist.LKJCholesky(3, torch.tensor([1.0, 2.0]))
    before = prior._beta

    def model() -> None:
        with pyro.plate("two", 2):
            pyro.sample("c", prior)

    draws = from_pyro(model).prior(10, seed=0)["c"]

    assert prior._beta is before
    assert draws.shape == (10, 2, 3, 3)

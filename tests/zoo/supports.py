"""One model for each kind of support, proper and dependent."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from zoo.case import Case, Family

MODELS = Family()


def _improper(support: constraints.Constraint, *shape: int) -> dist.ImproperUniform:
    event = shape[len(shape) - support.event_dim :]
    return dist.ImproperUniform(support, shape[: len(shape) - support.event_dim], event)


@MODELS
def scales_and_intervals() -> Case:
    def model() -> None:
        pyro.sample("real", dist.StudentT(4.0, 1.0, 2.0))
        pyro.sample("positive", dist.Gamma(2.0, 3.0))
        pyro.sample("nonnegative", dist.HalfCauchy(2.0))
        pyro.sample("unit", dist.Beta(2.0, 3.0))
        pyro.sample("interval", dist.Uniform(-2.0, 5.0))
        pyro.sample("above", dist.Pareto(1.5, 3.0))
        pyro.sample(
            "below",
            dist.TransformedDistribution(
                dist.Exponential(1.0), dist.transforms.AffineTransform(2.0, -1.0)
            ),
        )
        pyro.sample("logistic", dist.Logistic(0.0, 1.0))
        pyro.sample("weibull", dist.Weibull(1.0, 2.0))
        pyro.sample("lognormal", dist.LogNormal(0.0, 0.7))
        pyro.sample("kumaraswamy", dist.Kumaraswamy(2.0, 3.0))

    return Case(model)


@MODELS
def simplexes() -> Case:
    def model(counts: Tensor) -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
        with pyro.plate("rows", 2):
            q = pyro.sample("q", dist.Dirichlet(torch.ones(3)))
            pyro.sample("y", dist.Multinomial(9, q * p / (q * p).sum(-1, True)), obs=counts)

    return Case(model, (torch.tensor([[3.0, 2.0, 4.0], [0.0, 9.0, 0.0]]),))


@MODELS
def ordered_cutpoints() -> Case:
    def model(x: Tensor, y: Tensor) -> None:
        cut = pyro.sample(
            "cut",
            dist.TransformedDistribution(
                dist.Normal(torch.zeros(3), 1.0).to_event(1), dist.transforms.OrderedTransform()
            ),
        )
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.OrderedLogistic(b * x, cut), obs=y)

    return Case(model, (torch.linspace(-1, 1, 5), torch.tensor([0, 1, 3, 2, 1])))


@MODELS
def flat_on_every_support() -> Case:
    def model() -> None:
        supports = {
            "ordered": (constraints.ordered_vector, 3),
            "positive_ordered": (constraints.positive_ordered_vector, 3),
            "softplus": (constraints.softplus_positive, 2),
            "greater": (constraints.greater_than(1.5), 2),
            "at_least": (constraints.greater_than_eq(-1.0), 2),
            "less": (constraints.less_than(-0.5), 2),
            "half_open": (constraints.half_open_interval(0.0, 3.0), 2),
            "vector": (constraints.independent(constraints.positive, 1), 2, 3),
            "corr": (constraints.corr_matrix, 2, 3, 3),
            "corr_cholesky": (constraints.corr_cholesky, 3, 3),
            "lower_cholesky": (constraints.lower_cholesky, 2, 3, 3),
            "softplus_cholesky": (constraints.softplus_lower_cholesky, 3, 3),
            "unit_cholesky": (constraints.unit_lower_cholesky, 3, 3),
            "positive_definite": (constraints.positive_definite, 2, 2, 2),
            "stack": (constraints.stack([constraints.real, constraints.positive], -1), 2),
            "cat": (constraints.cat([constraints.unit_interval, constraints.real], -1, [2, 1]), 3),
        }
        for name, (support, *shape) in supports.items():
            value = pyro.sample(name, _improper(support, *shape))
            pyro.factor(f"{name}_pull", -0.5 * (value - 0.2).square().sum())

    return Case(model, simulates=False)


@MODELS
def lkj_covariance() -> Case:
    def model(y: Tensor) -> None:
        sd = pyro.sample("sd", dist.HalfNormal(torch.ones(3)).to_event(1))
        chol = pyro.sample("L", dist.LKJCholesky(3, 2.0))
        corr = pyro.deterministic("corr", chol @ chol.mT, event_dim=2)
        assert corr.shape == (3, 3)
        with pyro.plate("n", len(y)):
            pyro.sample(
                "y", dist.MultivariateNormal(torch.zeros(3), scale_tril=sd[:, None] * chol), obs=y
            )

    return Case(model, (torch.randn(4, 3),))


@MODELS
def lkj_matrix() -> Case:
    def model() -> None:
        pyro.sample("R", dist.LKJ(3, 1.5))

    return Case(model)


@MODELS
def wishart() -> Case:
    def model(y: Tensor) -> None:
        precision = pyro.sample("P", dist.Wishart(torch.tensor(5.0), torch.eye(3)))
        with pyro.plate("n", len(y)):
            pyro.sample(
                "y", dist.MultivariateNormal(torch.zeros(3), precision_matrix=precision), obs=y
            )

    return Case(model, (torch.randn(4, 3),), how="tape")


@MODELS
def von_mises() -> Case:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.VonMises(0.3, 2.0))
        pair = pyro.sample("pair", dist.VonMises(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.VonMises(loc + pair.sum(), 4.0), obs=y)

    return Case(model, (torch.linspace(-3, 3, 5),))


@MODELS
def dependent_bounds() -> Case:
    def model() -> None:
        a = pyro.sample("a", dist.LogNormal(0.0, 0.5))
        b = pyro.sample("b", dist.Uniform(-a, a + 1.0))
        c = pyro.sample("c", dist.Pareto(b + a + 0.1, 2.0))
        with pyro.plate("k", 3):
            d = pyro.sample("d", dist.Uniform(0.0, c))
        pyro.sample("e", dist.Uniform(torch.zeros(3), d).to_event(1))

    return Case(model)


@MODELS
def truncated_by_a_latent() -> Case:
    def model(y: Tensor) -> None:
        low = pyro.sample("low", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        shifted = dist.transforms.AffineTransform(low, scale)
        x = pyro.sample("x", dist.TransformedDistribution(dist.Exponential(1.0), shifted))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    return Case(model, (torch.tensor([0.5, 1.5]),))


@MODELS
def vectors_and_matrices() -> Case:
    def model(x: Tensor, y: Tensor) -> None:
        v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        m = pyro.sample("M", dist.Laplace(0.0, 1.0).expand([4, 3]).to_event(2))
        t = pyro.sample("T", dist.HalfNormal(1.0).expand([2, 2, 2]).to_event(3))
        with pyro.plate("n", len(y)):
            mean = x @ m.sum(-1) + x @ v * t.sum()
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    return Case(model, (torch.randn(5, 4), torch.randn(5)))


@MODELS
def mixture_prior() -> Case:
    def model() -> None:
        parts = dist.Normal(torch.tensor([-2.0, 2.0]), torch.tensor([0.5, 1.0]))
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), parts))
        sizes = dist.LogNormal(torch.tensor([-2.0, 2.0]), 0.5)
        pyro.sample("s", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), sizes))

    return Case(model)


@MODELS
def improper_location() -> Case:
    def model(y: Tensor) -> None:
        m = pyro.sample("m", _improper(constraints.real))
        s = pyro.sample("s", _improper(constraints.positive))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(m, s), obs=y)

    return Case(model, (torch.randn(5) + math.pi,), simulates=False)

"""Models whose evidence, and the moments of whose posterior, are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from scipy.special import gammaln, multigammaln
from torch import Tensor

EXACT: dict[str, Callable[[], Exact]] = {}
# Means and standard deviations of sites.
Moments = dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Exact:
    """A model with its arguments, and what is known of it.

    Args:
        model: A Pyro model.
        args: Its arguments.
        log_evidence: Of the data; zero for a prior alone.
        moments: Site -> mean and standard deviation of its values, each of its shape.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    log_evidence: float = 0.0
    moments: Moments = field(default_factory=dict)


def exact(build: Callable[[], Exact]) -> Callable[[], Exact]:
    EXACT[build.__name__] = build
    return build


def gaussian(
    y: Tensor, design: Tensor, noise: Tensor, covariance: Tensor
) -> tuple[float, Tensor, Tensor]:
    """Log evidence, posterior mean and sd of z ~ N(0, covariance), y ~ N(design z, noise)."""
    total = design @ covariance @ design.mT + noise
    gain = torch.linalg.solve(total, design @ covariance).mT
    rest = covariance - gain @ design @ covariance
    law = dist.MultivariateNormal(torch.zeros(len(y)), total)
    return float(law.log_prob(y)), gain @ y, rest.diagonal().sqrt()


def beta_moments(a: float, b: float) -> tuple[float, float]:
    return a / (a + b), math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1)))


# Conjugate pairs.


@exact
def normal_mean() -> Exact:
    y = torch.tensor([0.5, 1.5, -0.3, 2.0])

    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 2.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(m, 1.5), obs=y)

    found = gaussian(y, torch.ones(4, 1), 2.25 * torch.eye(4), 4.0 * torch.eye(1))
    return Exact(model, (y,), found[0], {"m": (found[1][0], found[2][0])})


@exact
def missing_rows() -> Exact:
    y = torch.tensor([0.5, math.nan, -0.3, math.nan])

    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 2.0))
        with pyro.plate("row", len(y)), poutine.mask(mask=~y.isnan()):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    there = y[~y.isnan()]
    found = gaussian(there, torch.ones(2, 1), torch.eye(2), 4.0 * torch.eye(1))
    return Exact(model, (y,), found[0], {"m": (found[1][0], found[2][0])})


@exact
def tempered_likelihood() -> Exact:
    """N(y; m, 1)^(1/2) is N(y; m, 2) times a constant."""

    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)), poutine.scale(scale=0.5):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    y = torch.tensor([1.0, 2.0, 0.0])
    found = gaussian(y, torch.ones(3, 1), 2.0 * torch.eye(3), torch.eye(1))
    constant = 3 * (0.25 * math.log(2 * math.pi) + 0.5 * math.log(2.0))
    return Exact(model, (y,), found[0] + constant, {"m": (found[1][0], found[2][0])})


@exact
def factor_of_a_constant() -> Exact:
    def model() -> None:
        pyro.sample("m", dist.Normal(3.0, 2.0))
        pyro.factor("c", torch.tensor(-1.25))

    return Exact(model, (), -1.25, {"m": (3.0, 2.0)})


@exact
def beta_bernoulli() -> Exact:
    y = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])

    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    def log_beta(a: float, b: float) -> float:
        return float(gammaln(a) + gammaln(b) - gammaln(a + b))

    evidence = log_beta(5.0, 5.0) - log_beta(2.0, 3.0)
    return Exact(model, (y,), evidence, {"p": beta_moments(5.0, 5.0)})


@exact
def gamma_poisson() -> Exact:
    y = torch.tensor([3.0, 1.0, 4.0])

    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    evidence = gammaln(10.0) - gammaln(2.0) - 10 * math.log(4.0) - gammaln(y.numpy() + 1).sum()
    return Exact(model, (y,), float(evidence), {"rate": (10 / 4, math.sqrt(10) / 4)})


@exact
def gamma_exponential() -> Exact:
    y = torch.tensor([0.5, 2.0, 1.0, 0.1])

    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Exponential(rate), obs=y)

    b = 2.0 + float(y.sum())
    evidence = gammaln(7.0) - gammaln(3.0) + 3 * math.log(2.0) - 7 * math.log(b)
    return Exact(model, (y,), float(evidence), {"rate": (7 / b, math.sqrt(7) / b)})


@exact
def dirichlet_categorical() -> Exact:
    y, a = torch.tensor([0, 2, 0, 1, 2, 0]), np.array([1.0, 2.0, 1.5])

    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.as_tensor(a)))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Categorical(p), obs=y)

    b = a + np.array([3.0, 1.0, 2.0])
    evidence = gammaln(a.sum()) - gammaln(b.sum()) + (gammaln(b) - gammaln(a)).sum()
    mean = b / b.sum()
    sd = np.sqrt(mean * (1 - mean) / (b.sum() + 1))
    return Exact(model, (y,), float(evidence), {"p": (mean, sd)})


@exact
def normal_inverse_gamma() -> Exact:
    """A mean and a variance: the data are those of a Student t in several dimensions."""
    y = torch.tensor([1.0, 2.5, 0.5, 1.7, 2.2])

    def model(y: Tensor) -> None:
        v = pyro.sample("v", dist.InverseGamma(6.0, 4.0))
        m = pyro.sample("m", dist.Normal(1.0, v.sqrt()))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(m, v.sqrt()), obs=y)

    n, mean = 5, float(y.mean())
    b = 4.0 + 0.5 * float((y - mean).square().sum()) + 0.5 * n / (n + 1) * (mean - 1.0) ** 2
    a = 6.0 + n / 2
    evidence = gammaln(a) - gammaln(6.0) + 6 * math.log(4.0) - a * math.log(b)
    evidence -= 0.5 * math.log(n + 1) + n / 2 * math.log(2 * math.pi)
    v = b / (a - 1)
    moments = {
        "v": (v, v / math.sqrt(a - 2)),
        "m": ((1.0 + n * mean) / (n + 1), math.sqrt(v / (n + 1))),
    }
    return Exact(model, (y,), float(evidence), moments)


@exact
def wishart_precision() -> Exact:
    y = torch.tensor([[0.5, -0.2], [1.0, 0.7], [-0.6, 0.1], [0.2, -1.1]])

    def model(y: Tensor) -> None:
        precision = pyro.sample("P", dist.Wishart(torch.tensor(5.0).to(y), torch.eye(2).to(y)))
        law = dist.MultivariateNormal(torch.zeros(2), precision_matrix=precision)
        with pyro.plate("row", len(y)):
            pyro.sample("y", law, obs=y)

    n, nu, d = len(y), 5.0, 2
    scale = torch.linalg.inv(torch.eye(d) + y.mT @ y)
    evidence = multigammaln((nu + n) / 2, d) - multigammaln(nu / 2, d)
    evidence += 0.5 * (nu + n) * float(torch.logdet(scale)) - n * d / 2 * math.log(math.pi)
    mean = (nu + n) * scale
    diagonal = scale.diagonal()
    variance = (nu + n) * (scale.square() + diagonal[:, None] * diagonal)
    return Exact(model, (y,), float(evidence), {"P": (mean, variance.sqrt())})


@exact
def pareto_uniform() -> Exact:
    y = torch.tensor([0.5, 2.0, 1.2, 1.9])

    def model(y: Tensor) -> None:
        top = pyro.sample("top", dist.Pareto(2.5, 3.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Uniform(0.0, top), obs=y)

    a = 3.0 + 4
    evidence = math.log(3.0) + 3 * math.log(2.5) - math.log(a) - a * math.log(2.5)
    sd = 2.5 * math.sqrt(a / ((a - 1) ** 2 * (a - 2)))
    return Exact(model, (y,), evidence, {"top": (a * 2.5 / (a - 1), sd)})


@exact
def two_parts_summed_out() -> Exact:
    """Each row is of one of two parts; over the one latent mean by quadrature."""
    y = torch.tensor([-1.0, 0.5, 2.0])

    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.5))
        with pyro.plate("row", len(y)):
            part = pyro.sample("part", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(m + 2.0 * part, 0.8), obs=y)

    m = torch.linspace(-12, 12, 20_001)
    parts = torch.stack([dist.Normal(m[:, None] + 2.0 * k, 0.8).log_prob(y) for k in (0, 1)])
    weights = torch.tensor([0.7, 0.3]).log()[:, None, None]
    log_p = (parts + weights).logsumexp(0).sum(-1) + dist.Normal(0.0, 1.5).log_prob(m)
    p = log_p.exp() * (m[1] - m[0])
    mean = float((p * m).sum() / p.sum())
    sd = math.sqrt(float((p * (m - mean) ** 2).sum() / p.sum()))
    return Exact(model, (y,), math.log(float(p.sum())), {"m": (mean, sd)})


# Gaussian models of structure.


@exact
def linear_regression() -> Exact:
    torch.manual_seed(1)
    x, y = torch.randn(12, 3), torch.randn(12)

    def model(x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x @ b, 0.7), obs=y)

    found = gaussian(y, x, 0.49 * torch.eye(12), 4.0 * torch.eye(3))
    return Exact(model, (x, y), found[0], {"b": found[1:]})


@exact
def random_walk() -> Exact:
    y = torch.tensor([0.3, 0.8, 0.5, 1.4, 2.0])

    def model(y: Tensor) -> None:
        x: Any = 0.0
        for t in range(len(y)):
            x = pyro.sample(f"x_{t}", dist.Normal(x, 0.6))
            pyro.sample(f"y_{t}", dist.Normal(x, 0.4), obs=y[t])

    t = torch.arange(1.0, 6.0)
    found = gaussian(y, torch.eye(5), 0.16 * torch.eye(5), 0.36 * torch.minimum(t[:, None], t))
    moments = {f"x_{i}": (found[1][i], found[2][i]) for i in range(5)}
    return Exact(model, (y,), found[0], moments)


@exact
def gaussian_process() -> Exact:
    x = torch.linspace(0, 3, 6)
    y = torch.sin(x)
    kernel = torch.exp(-0.5 * (x[:, None] - x).square()) + 1e-6 * torch.eye(6)

    def model(y: Tensor) -> None:
        f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(6), kernel.to(y)))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(f, 0.3), obs=y)

    found = gaussian(y, torch.eye(6), 0.09 * torch.eye(6), kernel)
    return Exact(model, (y,), found[0], {"f": found[1:]})


@exact
def crossed_effects() -> Exact:
    torch.manual_seed(2)
    y = torch.randn(3, 4)

    def model(y: Tensor) -> None:
        rows, columns = pyro.plate("a", 3, dim=-2), pyro.plate("b", 4, dim=-1)
        with rows:
            a = pyro.sample("u", dist.Normal(0.0, 1.0))
        with columns:
            b = pyro.sample("v", dist.Normal(0.0, 0.5))
        with rows, columns:
            pyro.sample("y", dist.Normal(a + b, 0.8), obs=y)

    design = torch.cat([torch.eye(3).repeat_interleave(4, 0), torch.eye(4).repeat(3, 1)], 1)
    prior = torch.diag(torch.tensor([1.0] * 3 + [0.25] * 4))
    found = gaussian(y.flatten(), design, 0.64 * torch.eye(12), prior)
    moments = {
        "u": (found[1][:3, None], found[2][:3, None]),
        "v": (found[1][3:], found[2][3:]),
    }
    return Exact(model, (y,), found[0], moments)


@exact
def nested_effects() -> Exact:
    torch.manual_seed(3)
    y = torch.randn(3, 4)

    def model(y: Tensor) -> None:
        top = pyro.sample("top", dist.Normal(0.0, 2.0))
        with pyro.plate("group", 3, dim=-2):
            mean = pyro.sample("mean", dist.Normal(top, 0.7))
            with pyro.plate("row", 4, dim=-1):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    # Of the vector (top, means).
    prior = 4.0 * torch.ones(4, 4) + torch.diag(torch.tensor([0.0, 0.49, 0.49, 0.49]))
    design = torch.cat([torch.zeros(12, 1), torch.eye(3).repeat_interleave(4, 0)], 1)
    found = gaussian(y.flatten(), design, torch.eye(12), prior)
    moments = {
        "top": (found[1][0], found[2][0]),
        "mean": (found[1][1:, None], found[2][1:, None]),
    }
    return Exact(model, (y,), found[0], moments)


# Priors alone: their evidence is zero.


@exact
def six_decades() -> Exact:
    scales = 10.0 ** torch.arange(-3.0, 4.0)

    def model() -> None:
        pyro.sample("x", dist.Normal(5 * scales, scales).to_event(1))

    return Exact(model, (), 0.0, {"x": (5 * scales, scales)})


@exact
def funnel() -> Exact:
    def model() -> None:
        v = pyro.sample("v", dist.Normal(0.0, 1.5))
        with pyro.plate("dim", 3):
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    return Exact(model, (), 0.0, {"v": (0.0, 1.5)})


@exact
def banana() -> Exact:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x**2, 0.5))

    return Exact(model, (), 0.0, {"x": (0.0, 1.0), "y": (1.0, math.sqrt(2.25))})


@exact
def two_modes() -> Exact:
    def model() -> None:
        parts = dist.Normal(torch.tensor([-3.0, 3.0]), 1.0)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.4, 0.6])), parts))

    return Exact(model, (), 0.0, {"x": (0.6, math.sqrt(10 - 0.36))})


@exact
def supports_that_depend() -> Exact:
    def model() -> None:
        a = pyro.sample("a", dist.LogNormal(0.0, 0.3))
        pyro.sample("b", dist.Uniform(-a, a + 1.0))

    mean = math.exp(0.045)
    second = math.exp(0.18)
    variance = (4 * second + 4 * mean + 1) / 12
    spread = math.sqrt(second - mean**2)
    return Exact(model, (), 0.0, {"a": (mean, spread), "b": (0.5, math.sqrt(variance))})


@exact
def lkj_prior() -> Exact:
    def model() -> None:
        pyro.sample("L", dist.LKJCholesky(3, 2.0))

    return Exact(model)


@exact
def directions_on_a_circle() -> Exact:
    def model() -> None:
        pyro.sample("angle", dist.VonMises(0.3, 4.0))

    return Exact(model)


@exact
def heavy_tails() -> Exact:
    def model() -> None:
        pyro.sample("x", dist.StudentT(5.0).expand([2]).to_event(1))

    return Exact(model, (), 0.0, {"x": (torch.zeros(2), torch.full((2,), math.sqrt(5 / 3)))})


@exact
def order_statistics() -> Exact:
    """Sorted normals, by the transform of an ordered vector."""

    def model() -> None:
        base = dist.Normal(torch.zeros(3), 0.5).to_event(1)
        pyro.sample("cut", dist.TransformedDistribution(base, dist.transforms.OrderedTransform()))

    return Exact(model)

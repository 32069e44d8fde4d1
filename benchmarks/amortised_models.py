"""The six models of `amortised.py`: each with its example arguments, and what is exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

SPREAD, NOISE = 10.0, 2.0
DAYS, EVERY, PEOPLE, TESTED = 10, 8.0, 1e6, 1000
START = 1.0


def gaussian_mean(y: Tensor) -> None:
    """A mean with a normal prior, known noise and varying numbers of rows: all exact."""
    mean = pyro.sample("mean", dist.Normal(0.0, SPREAD))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mean, NOISE), obs=y)


def eight_schools(effect: Tensor, error: Tensor) -> None:
    """Partial pooling of eight effects, not centred; standard errors are covariates."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effect)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, error), obs=effect)


def logistic(x: Tensor, y: Tensor) -> None:
    """Logistic regression on three covariates, with varying numbers of rows."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
    with pyro.plate("coefficient", x.shape[1]):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=intercept + x @ slope), obs=y)


def poisson_groups(group: Tensor, y: Tensor) -> None:
    """Counts in eight groups whose log rates are exchangeable, not centred."""
    mu = pyro.sample("mu", dist.Normal(1.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(0.7))
    with pyro.plate("group", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson((mu + tau * eta)[group].exp()), obs=y)


def sir(infected: Tensor) -> None:
    """An epidemic by an ordinary differential equation; ten surveys of a thousand people.

    Lueckmann et al. (2021), "Benchmarking simulation-based inference", arXiv:2101.04653, T.9, with
    half the days.
    """
    contact = pyro.sample("contact", dist.LogNormal(math.log(0.4), 0.5))
    recovery = pyro.sample("recovery", dist.LogNormal(math.log(0.125), 0.2))

    def change(s: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        new = contact * s * i
        return -new, new - recovery * i

    s, i = 1 - START / PEOPLE + 0 * contact, START / PEOPLE + 0 * contact
    shares, h = [], EVERY / 4
    for _ in range(DAYS):
        for _ in range(4):  # a step of Runge and Kutta
            a = change(s, i)
            b = change(s + h / 2 * a[0], i + h / 2 * a[1])
            c = change(s + h / 2 * b[0], i + h / 2 * b[1])
            d = change(s + h * c[0], i + h * c[1])
            s = s + h / 6 * (a[0] + 2 * b[0] + 2 * c[0] + d[0])
            i = i + h / 6 * (a[1] + 2 * b[1] + 2 * c[1] + d[1])
        shares.append(i)
    share = torch.stack(shares).clamp(1e-9, 1 - 1e-9)
    with pyro.plate("survey", DAYS):
        pyro.sample("infected", dist.Binomial(TESTED, share), obs=infected)


class Crescent(dist.TorchDistribution):
    """A point on a noisy half circle right of a centre: one row of two moons."""

    arg_constraints: Mapping[str, Any] = {}
    support = dist.constraints.real_vector

    def __init__(self, centre: Tensor) -> None:
        self.centre = centre
        super().__init__(centre.shape[:-1], centre.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Crescent:
        return Crescent(self.centre.expand(*batch_shape, 2))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = (*sample_shape, *self.batch_shape)
        angle = math.pi * (torch.rand(shape) - 0.5)
        radius = 0.1 + 0.01 * torch.randn(shape)
        return self.centre + torch.stack([radius * angle.cos(), radius * angle.sin()], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        x, y = (value - self.centre).unbind(-1)
        radius = (x.square() + y.square()).sqrt()
        within = dist.Normal(0.1, 0.01).log_prob(radius) - radius.log() - math.log(math.pi)
        return torch.where(x > 0, within, within - 1e4 * (1 + x.abs()))


def two_moons(x: Tensor) -> None:
    """Two crescents in the plane, one number pair observed: arXiv:2101.04653, T.8."""
    theta = pyro.sample("theta", dist.Uniform(-1.0, 1.0).expand([2]).to_event(1))
    total, difference = theta[0] + theta[1], theta[1] - theta[0]
    centre = torch.stack([0.25 - total.abs() / 2**0.5, difference / 2**0.5])
    pyro.sample("x", Crescent(centre), obs=x)


@dataclass(frozen=True)
class Model:
    """A model with its example.

    Attributes:
        model: The Pyro model.
        args: Its example arguments.
        evidence: Function of observed values to the exact log evidence, where that is known.
    """

    model: Callable[..., None]
    args: tuple[Tensor, ...]
    evidence: Callable[[Mapping[str, Tensor]], float] | None = None


def exact_evidence(data: Mapping[str, Tensor]) -> float:
    """Log evidence of the mean of normal rows."""
    y = data["y"].double()
    n, vague = len(y), SPREAD**2 / NOISE**2
    rest = y.square().sum() - vague * y.sum().square() / (1 + n * vague)
    constant = n * math.log(2 * math.pi * NOISE**2) + math.log(1 + n * vague)
    return float(-0.5 * (constant + rest / NOISE**2))


def models() -> dict[str, Model]:
    """The six models by name."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator)
    error = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    return {
        "gaussian_mean": Model(gaussian_mean, (torch.zeros(20),), exact_evidence),
        "eight_schools": Model(eight_schools, (torch.zeros(8), error)),
        "logistic": Model(logistic, (x, torch.ones(50))),
        "poisson_groups": Model(poisson_groups, (torch.arange(40) % 8, torch.ones(40))),
        "sir": Model(sir, (torch.ones(DAYS),)),
        "two_moons": Model(two_moons, (torch.tensor([0.1, 0.0]),)),
    }

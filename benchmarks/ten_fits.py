"""Ten small fits whose cost is counted: each a target, and arguments of `flowvi.fit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import corpus
import pyro
import pyro.distributions as dist
import torch
from counting import Counts, counted
from torch import Tensor
from torch.distributions import constraints

import flowvi

DOUBLE = torch.float64


class Counted(NamedTuple):
    """A fit and what it took.

    Attributes:
        counts: Steps and evaluations until the fit is there.
        verdict: Verdict on 4,000 draws.
        gap: Their estimate of KL(q || p).
    """

    counts: Counts
    verdict: str
    gap: float


def count(name: str) -> Counted:
    """Fit one of the ten without a compiler; counts, verdict and gap."""
    build, settings = FITS[name]
    with counted() as counts:
        fit = flowvi.fit(build(), seed=0, compile=False, progress=False, **settings)
    found = flowvi.diagnose(fit.draw(4000, seed=0))
    return Counted(counts, found.verdict, found.gap)


def _pyro(model: Callable[..., Any], *args: Any) -> flowvi.Target:
    target: flowvi.Target = flowvi.from_pyro(model, *args)
    return target


def poisson() -> flowvi.Target:
    """The README's Pyro model."""

    def model(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 2.0))
        b = pyro.sample("b", dist.Normal(x.new_zeros(()), 2.0))
        with pyro.plate("row", len(x)):
            pyro.sample("y", dist.Poisson((a + b * x).exp()), obs=y)

    x = torch.tensor([0.1, 0.5, 0.9, 1.3, 1.7, 2.1, 2.5, 2.9], dtype=DOUBLE)
    return _pyro(model, x, torch.tensor([1.0, 0, 2, 3, 2, 5, 4, 9], dtype=DOUBLE))


def gamma() -> flowvi.Target:
    """The README's plain density."""
    rain = torch.tensor([1.2, 0.4, 2.9, 1.7, 0.8], dtype=DOUBLE)
    positive = flowvi.Site(support=constraints.positive)

    def log_density(v: dict[str, Tensor]) -> Tensor:
        likelihood = torch.distributions.Gamma(v["shape"], v["rate"]).log_prob(rain).sum()
        return likelihood - (v["shape"] + v["rate"])

    return flowvi.from_density(log_density, {"shape": positive, "rate": positive})


def normal() -> flowvi.Target:
    """A correlated normal, D = 5."""
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(5, 5, generator=generator, dtype=DOUBLE)
    precision = root @ root.mT + torch.eye(5, dtype=DOUBLE)

    def log_density(v: dict[str, Tensor]) -> Tensor:
        return -0.5 * v["x"] @ precision @ v["x"]

    return flowvi.from_density(log_density, {"x": flowvi.Site((5,))})


def hierarchy() -> flowvi.Target:
    """Twenty groups of a non-centred hierarchy, D = 22."""
    generator = torch.Generator().manual_seed(2)
    y = torch.randn(20, generator=generator, dtype=DOUBLE) * 1.5 + 1.0

    def model(y: Tensor) -> None:
        zero = y.new_zeros(())
        mean = pyro.sample("mean", dist.Normal(zero, 5.0))
        spread = pyro.sample("spread", dist.HalfNormal(zero + 2.0))
        with pyro.plate("group", len(y)):
            offset = pyro.sample("offset", dist.Normal(zero, 1.0))
            pyro.sample("y", dist.Normal(mean + spread * offset, 1.0), obs=y)

    return _pyro(model, y)


def two_modes() -> flowvi.Target:
    """Two normals of the plane, apart by eight sds."""

    def log_density(v: dict[str, Tensor]) -> Tensor:
        apart = torch.stack([v["x"] - 4.0, v["x"] + 4.0])
        return torch.logsumexp(-0.5 * apart.square().sum(-1), 0)

    return flowvi.from_density(log_density, {"x": flowvi.Site((2,))})


def ordinal() -> flowvi.Target:
    """Ordinal regression with two covariates and three cut points, D = 5."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(60, 2, generator=generator, dtype=DOUBLE)
    latent = x @ torch.tensor([1.0, -0.5], dtype=DOUBLE)
    latent = latent + torch.randn(60, generator=generator, dtype=DOUBLE)
    y = (latent[:, None] > torch.tensor([-1.0, 0.0, 1.0], dtype=DOUBLE)).sum(-1)

    def model(x: Tensor, y: Tensor) -> None:
        zero = x.new_zeros(())
        b = pyro.sample("b", dist.Normal(zero, 2.0).expand([2]).to_event(1))
        cuts = pyro.sample(
            "cuts",
            dist.TransformedDistribution(
                dist.Normal(x.new_zeros(3), 2.0).to_event(1), dist.transforms.OrderedTransform()
            ),
        )
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.OrderedLogistic(x @ b, cuts), obs=y)

    return _pyro(model, x, y)


def angle() -> flowvi.Target:
    """One angle with a von Mises posterior."""

    def log_density(v: dict[str, Tensor]) -> Tensor:
        angle = 2 * torch.atan(v["t"])  # the line wrapped round the circle
        return 2.0 * torch.cos(angle - 1.0) + torch.log(2 / (1 + v["t"].square()))

    return flowvi.from_density(log_density, {"t": flowvi.Site(())})


def simplex() -> flowvi.Target:
    """A flat density of four shares."""
    sites = {"p": flowvi.Site((4,), constraints.simplex)}
    return flowvi.from_density(lambda v: 0 * v["p"].sum(), sites)


def of_corpus(name: str) -> flowvi.Target:
    """A posterior whose model file brings its data."""
    module = corpus.load_model(name)
    return _pyro(module.model, *module.data())


Build = Callable[[], flowvi.Target]
FITS: dict[str, tuple[Build, dict[str, Any]]] = {
    "poisson regression": (poisson, {}),
    "gamma density": (gamma, {}),
    "normal, mean field": (normal, {"guide": "meanfield"}),
    "poisson, full rank": (poisson, {"guide": "fullrank"}),
    "hierarchy of 20": (hierarchy, {}),
    "eight schools": (lambda: of_corpus("eight_schools_noncentered"), {}),
    "two modes": (two_modes, {}),
    "ordinal regression": (ordinal, {}),
    "angle": (angle, {}),
    "simplex": (simplex, {}),
}

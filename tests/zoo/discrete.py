"""Discrete latents that are summed out."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import config_enumerate
from torch import Tensor

from zoo.case import Case, Family

MODELS = Family()
PARALLEL = {"enumerate": "parallel"}


@MODELS
def enumerated_mixture() -> Case:
    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("part", 2):
            mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        with pyro.plate("row", len(y)):
            c = pyro.sample("c", dist.Categorical(w), infer=PARALLEL)
            pyro.sample("y", dist.Normal(mu[c], s), obs=y)

    return Case(model, (torch.randn(5),), enumerated=True)


@MODELS
def enumerated_by_decorator() -> Case:
    @config_enumerate(default="parallel")
    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("row", len(y)):
            k = pyro.sample("k", dist.Bernoulli(p))
            pyro.sample("y", dist.Normal(2 * k - 1, 1.0), obs=y)

    return Case(model, (torch.randn(4),), enumerated=True)


@MODELS
def enumerated_outside_plates() -> Case:
    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.3), infer=PARALLEL)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(m + 2 * k, 1.0), obs=y)

    return Case(model, (torch.randn(4),), enumerated=True, rows=False)


@MODELS
def enumerated_markov_chain() -> Case:
    def model(y: Tensor) -> None:
        trans = pyro.sample("trans", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        k = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            k = pyro.sample(f"k_{t}", dist.Categorical(trans[k]), infer=PARALLEL)
            pyro.sample(f"y_{t}", dist.Normal(mu[k], 1.0), obs=y[t])

    return Case(model, (torch.randn(4),), enumerated=True, rows=False)


@MODELS
def enumerated_markov_chains_in_a_plate() -> Case:
    def model(y: Tensor) -> None:
        trans = pyro.sample("trans", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("series", y.shape[1]):
            k = torch.tensor(0)
            for t in pyro.markov(range(len(y))):
                k = pyro.sample(f"k_{t}", dist.Categorical(trans[k]), infer=PARALLEL)
                pyro.sample(f"y_{t}", dist.Normal(mu[k], 1.0), obs=y[t])

    return Case(model, (torch.randn(3, 2),), enumerated=True, rows=False)


@MODELS
def enumerated_in_two_levels() -> Case:
    def model(y: Tensor) -> None:
        q = pyro.sample("q", dist.Beta(2.0, 2.0))
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
        with pyro.plate("group", y.shape[1], dim=-1):
            g = pyro.sample("g", dist.Bernoulli(q), infer=PARALLEL).long()
            with pyro.plate("row", len(y), dim=-2):
                c = pyro.sample("c", dist.Categorical(torch.tensor([0.4, 0.6])), infer=PARALLEL)
                pyro.sample("y", dist.Normal(mu[g, c], 1.0), obs=y)

    return Case(model, (torch.randn(2, 3),), enumerated=True, rows=False)


@MODELS
def enumerated_beside_a_local_latent() -> Case:
    def model(y: Tensor) -> None:
        s = pyro.sample("s", dist.HalfNormal(1.0))
        with pyro.plate("row", len(y)):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.deterministic("shifted", x + s)
            outlier = pyro.sample("outlier", dist.Bernoulli(0.1), infer=PARALLEL)
            pyro.deterministic("scale_used", s + 5 * outlier)
            pyro.sample("y", dist.Normal(x, s + 5 * outlier), obs=y)

    return Case(model, (torch.randn(4),), enumerated=True)

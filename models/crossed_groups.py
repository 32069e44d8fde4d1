"""Crossed random effects: each of many persons rates some of 15 items.

Bates et al. (2015), "Fitting linear mixed-effects models using lme4". Given the items' effects the
persons are independent, and the other way about; together they are not. Generated data.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

PERSONS, ITEMS, RATINGS = 100, 15, 5


def simulate(groups: int = PERSONS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Person, item and value of each rating, each (5 groups,)."""
    rng = np.random.default_rng(seed)
    person = np.repeat(np.arange(groups), RATINGS)
    item = np.concatenate([rng.permutation(ITEMS)[:RATINGS] for _ in range(groups)])
    u, v = rng.normal(0.0, 0.7, groups), rng.normal(0.0, 0.5, ITEMS)
    rating = rng.normal(3.0 + u[person] + v[item], 0.8)
    return torch.tensor(person), torch.tensor(item), torch.tensor(rating)


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Person, item and value of the ratings of 100 persons."""
    return simulate()


def model(person: Tensor, item: Tensor, rating: Tensor) -> None:
    zero = rating.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau_u = pyro.sample("tau_u", dist.HalfNormal(zero + 1.0))
    tau_v = pyro.sample("tau_v", dist.HalfNormal(zero + 1.0))
    s = pyro.sample("s", dist.HalfNormal(zero + 1.0))
    with pyro.plate("person", int(person.max()) + 1):
        u = pyro.sample("u", dist.Normal(zero, tau_u))
    with pyro.plate("item", ITEMS):
        v = pyro.sample("v", dist.Normal(zero, tau_v))
    with pyro.plate("row", len(rating)):
        pyro.sample("rating", dist.Normal(mu + u[person] + v[item], s), obs=rating)

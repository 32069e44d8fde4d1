"""Poisson regression with a log rate for each group; five counts each, of unequal exposure.

McCulloch and Searle (2001), "Generalized, Linear, and Mixed Models", chapter 8. Its evidence and
moments are known by quadrature, because a group depends on the others through `mu` and `tau` alone.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

GROUPS, ROWS = 100, 5


def simulate(groups: int = GROUPS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Exposures and counts: a row for each group, each (groups, 5)."""
    rng = np.random.default_rng(seed)
    exposure = rng.gamma(4.0, 0.25, (groups, ROWS))
    rate = np.exp(rng.normal(0.0, 0.8, (groups, 1)))
    return torch.tensor(exposure), torch.tensor(rng.poisson(exposure * rate).astype(float))


def data() -> tuple[Tensor, Tensor]:
    """Exposures and counts of 100 groups, each (100, 5)."""
    return simulate()


def model(exposure: Tensor, count: Tensor) -> None:
    groups, rows = count.shape
    zero = count.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(zero + 1.0))
    with pyro.plate("group", groups):
        u = pyro.sample("u", dist.Normal(mu, tau))
        with pyro.plate("row", rows):
            pyro.sample("count", dist.Poisson(exposure.T * u.exp()), obs=count.T)

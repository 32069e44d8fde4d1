"""Normal hierarchy: a mean for each group, centred, and five measurements of each.

Gelman et al. (2013), "Bayesian Data Analysis", section 11.6. Its evidence and moments are known
by quadrature over both scales, for any number of groups.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

GROUPS, ROWS = 100, 5


def simulate(groups: int = GROUPS, seed: int = 0) -> tuple[Tensor]:
    """Measurements: a row for each group, (groups, 5)."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(1.0, 0.8, (groups, 1))
    return (torch.tensor(rng.normal(mean, 1.5, (groups, ROWS))),)


def data() -> tuple[Tensor]:
    """Measurements of 100 groups, (100, 5)."""
    return simulate()


def model(y: Tensor) -> None:
    groups, rows = y.shape
    zero = y.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(zero + 2.0))
    s = pyro.sample("s", dist.HalfNormal(zero + 2.0))
    with pyro.plate("group", groups, dim=-2):
        u = pyro.sample("u", dist.Normal(mu, tau))
        with pyro.plate("row", rows, dim=-1):
            pyro.sample("y", dist.Normal(u, s), obs=y)

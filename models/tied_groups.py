"""Normal hierarchy whose effects are tied: a factor holds their sum near zero.

The soft constraint that makes effects identifiable in many models; groups are not independent given
the scales. Morris et al. (2019), "Bayesian hierarchical spatial models: implementing the Besag York
Mollié model in Stan", section 3.3.
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
    effect = rng.normal(0.0, 0.8, (groups, 1))
    return (torch.tensor(rng.normal(1.0 + effect, 1.5, (groups, ROWS))),)


def data() -> tuple[Tensor]:
    """Measurements of 100 groups, (100, 5)."""
    return simulate()


def model(y: Tensor) -> None:
    zero = y.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(zero + 2.0))
    s = pyro.sample("s", dist.HalfNormal(zero + 2.0))
    with pyro.plate("group", len(y)):
        u = pyro.sample("u", dist.Normal(zero, tau))
        with pyro.plate("row", y.shape[1]):
            pyro.sample("y", dist.Normal(mu + u, s), obs=y.T)
    pyro.factor("sum_to_zero", dist.Normal(zero, 0.01 * len(y)).log_prob(u.sum()))

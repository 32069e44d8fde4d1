"""Normal hierarchy: a standardised offset for each group, and five measurements of each.

The model of normal_groups.py, non-centred: the same evidence and moments. Papaspiliopoulos, Roberts
and Sköld (2007), "A general framework for the parametrization of hierarchical models".
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
    zero = y.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(zero + 2.0))
    s = pyro.sample("s", dist.HalfNormal(zero + 2.0))
    with pyro.plate("group", len(y)):
        offset = pyro.sample("offset", dist.Normal(zero, 1.0))
        u = pyro.deterministic("u", mu + tau * offset)
        with pyro.plate("row", y.shape[1]):
            pyro.sample("y", dist.Normal(u, s), obs=y.T)

"""Logistic regression with an intercept for each group; groups have between 3 and 17 trials or so.

Agresti (2013), "Categorical Data Analysis", section 13.1. Its evidence and moments are known by
quadrature, because a group depends on the others through `mu` and `tau` alone.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

GROUPS = 100


def simulate(groups: int = GROUPS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Group of each trial and its outcome (0 or 1), each (N,)."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), 3 + rng.poisson(5.0, groups))
    logit = rng.normal(0.5, 1.0, groups)
    outcome = rng.random(len(group)) < 1 / (1 + np.exp(-logit[group]))
    return torch.tensor(group), torch.tensor(outcome.astype(float))


def data() -> tuple[Tensor, Tensor]:
    """Group and outcome of the trials of 100 groups."""
    return simulate()


def model(group: Tensor, outcome: Tensor) -> None:
    zero = outcome.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(zero + 1.0))
    with pyro.plate("group", int(group.max()) + 1):
        u = pyro.sample("u", dist.Normal(mu, tau))
    with pyro.plate("trial", len(outcome)):
        pyro.sample("outcome", dist.Bernoulli(logits=u[group]), obs=outcome)

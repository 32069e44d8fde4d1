"""Random intercepts and slopes that are correlated between groups, with an LKJ prior.

Barr et al. (2013), "Random effects structure for confirmatory hypothesis testing: keep it maximal";
Lewandowski, Kurowicka and Joe (2009), "Generating random correlation matrices based on vines and
extended onion method". All is normal given the scales and the correlation.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

GROUPS = 100


def simulate(groups: int = GROUPS, seed: int = 0, dim: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Group of each row, (N,); predictors that begin with a one, (N, dim); response, (N,)."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), 4 + rng.poisson(4.0, groups))
    x = np.concatenate([np.ones((len(group), 1)), rng.normal(size=(len(group), dim - 1))], 1)
    correlation = 0.4 + 0.6 * np.eye(dim)
    scale = np.linspace(0.8, 0.5, dim)[:, None] * np.linalg.cholesky(correlation)
    u = np.linspace(1.0, -0.5, dim) + rng.normal(size=(groups, dim)) @ scale.T
    y = rng.normal((x * u[group]).sum(1), 1.0)
    return torch.tensor(group), torch.tensor(x), torch.tensor(y)


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Group, predictors (a one and a slope's) and response of the rows of 100 groups."""
    return simulate()


def model(group: Tensor, x: Tensor, y: Tensor) -> None:
    dim = x.shape[1]
    zero = y.new_zeros(())
    beta = pyro.sample("beta", dist.Normal(zero, 5.0).expand([dim]).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(zero + 2.0).expand([dim]).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(dim, zero + 2.0))
    s = pyro.sample("s", dist.HalfNormal(zero + 2.0))
    with pyro.plate("group", int(group.max()) + 1):
        u = pyro.sample("u", dist.MultivariateNormal(beta, scale_tril=tau[:, None] * factor))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal((x * u[group]).sum(-1), s), obs=y)

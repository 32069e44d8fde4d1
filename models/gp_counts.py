"""Gaussian process on the log rate of Poisson counts at 150 points, of unknown range and size.

Rasmussen and Williams (2006), "Gaussian Processes for Machine Learning". Generated data.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

POINTS = 150
JITTER = 1e-6


def simulate(groups: int = POINTS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs in [0, 1] and counts, each (groups,)."""
    rng = np.random.default_rng(seed)
    x = np.sort(rng.random(groups))
    rate = np.exp(1.0 + np.sin(6 * x) + 0.5 * np.cos(17 * x))
    return torch.tensor(x), torch.tensor(rng.poisson(rate).astype(float))


def data() -> tuple[Tensor, Tensor]:
    """Inputs and counts, each (150,)."""
    return simulate()


def model(x: Tensor, count: Tensor) -> None:
    zero = x.new_zeros(())
    mean = pyro.sample("mean", dist.Normal(zero, 3.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(zero + 2.0))
    rho = pyro.sample("rho", dist.LogNormal(zero - 1.5, 0.5))
    distance = (x[:, None] - x) / rho
    covariance = alpha**2 * torch.exp(-(distance**2) / 2) + JITTER * torch.eye(len(x)).to(x)
    factor = torch.linalg.cholesky(covariance)
    f = pyro.sample("f", dist.MultivariateNormal(mean.expand(len(x)), scale_tril=factor))
    with pyro.plate("point", len(x)):
        pyro.sample("count", dist.Poisson(f.exp()), obs=count)

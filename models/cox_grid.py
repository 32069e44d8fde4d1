"""Log-Gaussian Cox process: points in the unit square, counted in the cells of a grid.

Møller, Syversveen and Waagepetersen (1998), "Log Gaussian Cox processes", with the mean, variance
and range that they give for 126 Scots pine saplings. Generated data; theirs are on a grid
of 40 x 40. There is no latent but the field.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

SIDE = 16
POINTS, VARIANCE, RANGE = 126, 1.91, 1 / 33
MEAN = float(np.log(POINTS)) - VARIANCE / 2


def scale_tril(side: int) -> Tensor:
    """Cholesky factor of the field's covariance, (side², side²)."""
    index = torch.arange(side, dtype=torch.float64)
    cell = torch.cartesian_prod(index, index) / side
    return torch.linalg.cholesky(VARIANCE * torch.exp(-torch.cdist(cell, cell) / RANGE))


def simulate(groups: int = SIDE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Counts in the cells, (groups, groups), and the Cholesky factor of the covariance."""
    rng = np.random.default_rng(seed)
    factor = scale_tril(groups)
    field = MEAN + factor.numpy() @ rng.normal(size=groups**2)
    count = rng.poisson(np.exp(field) / groups**2).astype(float)
    return torch.tensor(count.reshape(groups, groups)), factor


def data() -> tuple[Tensor, Tensor]:
    """Counts in 16 x 16 cells, and the Cholesky factor of the covariance, (256, 256)."""
    return simulate()


def model(count: Tensor, factor: Tensor) -> None:
    cells = count.numel()
    mean = factor.new_full((cells,), MEAN)
    field = pyro.sample("field", dist.MultivariateNormal(mean, scale_tril=factor))
    with pyro.plate("cell", cells):
        pyro.sample("count", dist.Poisson(field.exp() / cells), obs=count.flatten())

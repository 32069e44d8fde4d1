r"""Hares and lynxes: predator and prey by a differential equation, seen with log-normal error.

.. math:: \dot p = (\theta_1 - \theta_2 q) p, \quad \dot q = (-\theta_3 + \theta_4 p) q

Carpenter (2018), "Predator-prey population dynamics: the Lotka-Volterra model in Stan";
posteriordb's hudson_lynx_hare-lotka_volterra.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

STEPS = 10  # Runge-Kutta steps in a year


class PositiveNormal(dist.Normal):
    """Normal restricted to the positive numbers."""

    support = constraints.positive
    has_rsample = False

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) - torch.special.log_ndtr(self.loc / self.scale)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        uniform = self.loc.new_empty((*sample_shape, *self.batch_shape)).uniform_()
        above = uniform * torch.special.ndtr(self.loc / self.scale)
        return self.loc - self.scale * torch.special.ndtri(above)


def data(path: str) -> tuple[Tensor, Tensor]:
    """Hares and lynxes in thousands at year 0, (2,), and in each year after it, (20, 2)."""
    raw = json.loads(Path(path).read_text())
    return torch.tensor(raw["y_init"], dtype=torch.float64), torch.tensor(
        raw["y"], dtype=torch.float64
    )


def model(y_init: Tensor, y: Tensor) -> None:
    zero = y.new_zeros(())
    middle, spread = y.new_tensor([[1.0, 0.05, 1.0, 0.05], [0.5, 0.05, 0.5, 0.05]])
    with pyro.plate("rate", 4):
        theta = pyro.sample("theta", PositiveNormal(middle, spread))
    with pyro.plate("species", 2):
        z_init = pyro.sample("z_init", dist.LogNormal(zero + math.log(10.0), 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(zero - 1.0, 1.0))
        pyro.sample("y_init", dist.LogNormal(z_init.log(), sigma), obs=y_init)
        log_z = populations(theta, z_init.log(), years=len(y))
        with pyro.plate("year", len(y)):
            pyro.sample("y", dist.LogNormal(log_z, sigma), obs=y)


coords = {
    "rate": ["prey birth", "predation", "predator death", "predator birth"],
    "species": ["hare", "lynx"],
    "year": list(range(1901, 1921)),
}


def populations(theta: Tensor, log_z: Tensor, years: int) -> Tensor:
    """Solve for (log p, log q) after each year, (years, 2), by fourth-order Runge-Kutta.

    On logarithms the slopes are (theta_1, -theta_3) + (-theta_2, theta_4) * (q, p).
    """
    own = torch.stack([theta[0], -theta[2]]) / STEPS
    other = torch.stack([-theta[1], theta[3]]) / STEPS

    def change(x: Tensor) -> Tensor:
        return torch.addcmul(own, other, x.exp().flip(-1))

    path = []
    for _ in range(years):
        for _ in range(STEPS):
            k1 = change(log_z)
            k2 = change(log_z.add(k1, alpha=1 / 2))
            k3 = change(log_z.add(k2, alpha=1 / 2))
            k4 = change(log_z + k3)
            log_z = log_z.add(k1 + k4, alpha=1 / 6).add(k2 + k3, alpha=1 / 3)
        path.append(log_z)
    return torch.stack(path)

"""Varying intercepts and slopes: 918 measurements in 85 counties of very unequal size.

The shape of the Minnesota radon study, with generated data: intercepts depend on the uranium of the
county's soil. Gelman and Hill (2007), "Data Analysis Using Regression and Multilevel/Hierarchical
Models", chapter 13. All is normal given the three scales.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

COUNTIES = 85
HOUSES = 10.8  # of a county, on average


def simulate(groups: int = COUNTIES, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uranium of counties, (groups,); county, floor (0 or 1) and log level of houses, (N,)."""
    rng = np.random.default_rng(seed)
    extra = round(groups * HOUSES) - groups
    share = rng.dirichlet(np.full(groups, 0.5))
    county = np.sort(np.concatenate([np.arange(groups), rng.choice(groups, extra, p=share)]))
    floor = (rng.random(len(county)) < 0.17).astype(float)
    uranium = rng.normal(0.0, 0.4, groups)
    intercept = rng.normal(1.5 + 0.7 * uranium, 0.3)
    slope = rng.normal(-0.7, 0.4, groups)
    level = rng.normal(intercept[county] + slope[county] * floor, 0.75)
    return torch.tensor(uranium), torch.tensor(county), torch.tensor(floor), torch.tensor(level)


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uranium of 85 counties; county, floor (0 or 1) and log level of 918 houses."""
    return simulate()


def model(uranium: Tensor, county: Tensor, floor: Tensor, level: Tensor) -> None:
    zero = level.new_zeros(())
    mu_a = pyro.sample("mu_a", dist.Normal(zero, 5.0))
    gamma = pyro.sample("gamma", dist.Normal(zero, 5.0))
    mu_b = pyro.sample("mu_b", dist.Normal(zero, 5.0))
    tau_a = pyro.sample("tau_a", dist.HalfNormal(zero + 1.0))
    tau_b = pyro.sample("tau_b", dist.HalfNormal(zero + 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(zero + 1.0))
    with pyro.plate("county", len(uranium)):
        intercept = pyro.sample("intercept", dist.Normal(mu_a + gamma * uranium, tau_a))
        slope = pyro.sample("slope", dist.Normal(mu_b, tau_b))
    with pyro.plate("house", len(level)):
        mean = intercept[county] + slope[county] * floor
        pyro.sample("level", dist.Normal(mean, sigma), obs=level)

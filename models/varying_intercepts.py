"""Varying-intercept regression: 919 measurements in 85 groups of very unequal size.

The shape of the Minnesota radon study, with generated data. Gelman and Hill (2007), "Data Analysis
Using Regression and Multilevel/Hierarchical Models", chapter 12.
"""

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

ROWS, GROUPS = 919, 85


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Group and floor (0 or 1) of each measurement, and its log level, each (919,)."""
    rng = np.random.RandomState(85)  # its stream never changes, and reference() depends on it
    share = rng.dirichlet(np.full(GROUPS, 0.5))
    extra = rng.choice(GROUPS, size=ROWS - GROUPS, p=share)
    group = np.sort(np.concatenate([np.arange(GROUPS), extra]))  # no group is empty
    floor = (rng.random_sample(ROWS) < 0.17).astype(float)
    intercept = rng.normal(1.5, 0.3, size=GROUPS)
    level = intercept[group] - 0.7 * floor + rng.normal(0.0, 0.75, size=ROWS)
    return torch.tensor(group), torch.tensor(floor), torch.tensor(level)


def model(group: Tensor, floor: Tensor, level: Tensor) -> None:
    zero = level.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(zero + 1.0))
    slope = pyro.sample("slope", dist.Normal(zero, 5.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(zero + 1.0))
    with pyro.plate("group", GROUPS):
        intercept = pyro.sample("intercept", dist.Normal(mu, tau))
    with pyro.plate("measurement", len(level)):
        mean = intercept[group] + slope * floor
        pyro.sample("level", dist.Normal(mean, sigma), obs=level)


def reference() -> dict[str, Any]:
    """Evidence and moments, by quadrature over both scales with all else integrated exactly."""
    return {
        "log_evidence": -1067.736076,
        "mean": {"mu": 1.421561, "tau": 0.215793, "slope": -0.762207, "sigma": 0.744101},
        "sd": {"mu": 0.040476, "tau": 0.041125, "slope": 0.067471, "sigma": 0.018042},
    }

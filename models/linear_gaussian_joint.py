"""Weights theta and a latent of each row, all of it normal: posterior and evidence are exact.

y_n ~ N(x_n theta + z_n, s^2) with standard normal theta (2) and z_n. For guides of both together.
"""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

NOISE = 0.5
ROWS = 20


def data() -> tuple[Tensor, Tensor]:
    """Inputs (20, 2) and outputs (20,), drawn from the model."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(ROWS, 2)
    return x, x @ normal(2) + normal(ROWS) + NOISE * normal(ROWS)


def model(x: Tensor, y: Tensor | None = None) -> None:
    zero = x.new_zeros(())  # priors take their precision from the data
    theta = pyro.sample("theta", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(zero, 1.0))
        pyro.sample("y", dist.Normal(x @ theta + z, NOISE), obs=y)


def reference() -> dict[str, Any]:
    """Evidence and moments of theta, z integrated out: y ~ N(x theta, 1 + s^2)."""
    x, y = data()
    variance = 1 + NOISE**2
    covariance = torch.linalg.inv(x.mT @ x / variance + torch.eye(2).double())
    marginal = x @ x.mT + variance * torch.eye(ROWS).double()
    return {
        "log_evidence": float(dist.MultivariateNormal(x.new_zeros(ROWS), marginal).log_prob(y)),
        "mean": {"theta": (covariance @ x.mT @ y / variance).tolist()},
        "sd": {"theta": covariance.diagonal().sqrt().tolist()},
    }

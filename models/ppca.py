"""Probabilistic principal components with known loadings: the evidence is exact.

x_n ~ N(W z_n + m, s^2 I) with standard normal factors z_n (2) and level m (5). Tipping and Bishop
(1999), "Probabilistic Principal Component Analysis", Journal of the Royal Statistical Society B 61.
"""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

NOISE = 0.4
ROWS, WIDTH = 12, 5


def data() -> tuple[Tensor, Tensor]:
    """Loadings (5, 2) and rows (12, 5), drawn from the model."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    loadings = normal(WIDTH, 2)
    return loadings, normal(ROWS, 2) @ loadings.mT + normal(WIDTH) + NOISE * normal(ROWS, WIDTH)


def model(loadings: Tensor, x: Tensor) -> None:
    level = pyro.sample("level", dist.Normal(x.new_zeros(WIDTH), 1.0).to_event(1))
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ loadings.mT + level, NOISE).to_event(1), obs=x)


def reference() -> dict[str, Any]:
    """Evidence, and moments of the level: rows are N(m, W W^T + s^2 I)."""
    loadings, x = data()
    eye = torch.eye(WIDTH, dtype=x.dtype)
    row = loadings @ loadings.mT + NOISE**2 * eye
    precision = torch.linalg.inv(row)
    covariance = torch.linalg.inv(eye + ROWS * precision)
    joint = torch.kron(torch.eye(ROWS, dtype=x.dtype), row) + eye.repeat(ROWS, ROWS)
    zero = x.new_zeros(ROWS * WIDTH)
    return {
        "log_evidence": float(dist.MultivariateNormal(zero, joint).log_prob(x.flatten())),
        "mean": {"level": (covariance @ precision @ x.sum(0)).tolist()},
        "sd": {"level": covariance.diagonal().sqrt().tolist()},
    }

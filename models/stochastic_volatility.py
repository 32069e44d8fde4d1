"""Stochastic volatility: the log variance of a series of returns is an autoregression.

Kim, Shephard and Chib (1998), "Stochastic volatility: likelihood inference and comparison with ARCH
models". Generated data.
"""

from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

TIMES = 1000


class Autoregression(dist.TorchDistribution):
    """Stationary series h_t = mu + phi (h_(t-1) - mu) + sigma e_t, of the given length."""

    arg_constraints: ClassVar[dict[str, Any]] = {
        "mu": constraints.real,
        "phi": constraints.interval(-1.0, 1.0),
        "sigma": constraints.positive,
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, mu: Tensor, phi: Tensor, sigma: Tensor, length: int) -> None:
        self.mu, self.phi, self.sigma = mu, phi, sigma
        super().__init__(mu.shape, (length,), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Autoregression":
        mu, phi, sigma = (v.expand(batch_shape) for v in (self.mu, self.phi, self.sigma))
        return Autoregression(mu, phi, sigma, self.event_shape[0])

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        noise = torch.randn(self.shape(torch.Size(sample_shape))).to(self.mu)
        h = [noise[..., 0] / (1 - self.phi**2).sqrt()]
        for e in noise[..., 1:].unbind(-1):
            h.append(self.phi * h[-1] + e)
        return self.mu[..., None] + self.sigma[..., None] * torch.stack(h, -1)

    def log_prob(self, h: Tensor) -> Tensor:
        centred = h - self.mu[..., None]
        first = dist.Normal(0.0, self.sigma / (1 - self.phi**2).sqrt())
        step = dist.Normal(self.phi[..., None] * centred[..., :-1], self.sigma[..., None])
        return first.log_prob(centred[..., 0]) + step.log_prob(centred[..., 1:]).sum(-1)


def simulate(groups: int = TIMES, seed: int = 0) -> tuple[Tensor]:
    """Returns in percent at each time, (groups,)."""
    rng = np.random.default_rng(seed)
    mu, phi, sigma = -0.5, 0.97, 0.2
    h = np.empty(groups)
    h[0] = rng.normal(mu, sigma / np.sqrt(1 - phi**2))
    for t in range(1, groups):
        h[t] = rng.normal(mu + phi * (h[t - 1] - mu), sigma)
    return (torch.tensor(rng.normal(0.0, np.exp(h / 2))),)


def data() -> tuple[Tensor]:
    """Returns at 1000 times."""
    return simulate()


def model(y: Tensor) -> None:
    zero = y.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    persistence = pyro.sample("persistence", dist.Beta(zero + 20.0, zero + 1.5))
    phi = pyro.deterministic("phi", 2 * persistence - 1)
    sigma = pyro.sample("sigma", dist.HalfNormal(zero + 1.0))
    h = pyro.sample("h", Autoregression(mu, phi, sigma, len(y)))
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(zero, (h / 2).exp()), obs=y)

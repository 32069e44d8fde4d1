"""Local level model: a random walk that is measured with noise.

Durbin and Koopman (2012), "Time Series Analysis by State Space Methods", chapter 2. Its evidence
and moments are known by the Kalman filter and quadrature over both scales.
"""

from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

TIMES = 1000


class RandomWalk(dist.TorchDistribution):
    """Random walk of normal steps, of the given length; its first value is normal around zero."""

    arg_constraints: ClassVar[dict[str, Any]] = {
        "first": constraints.positive,
        "step": constraints.positive,
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, first: Tensor, step: Tensor, length: int) -> None:
        self.first, self.step = first, step
        super().__init__(step.shape, (length,), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "RandomWalk":
        first, step = self.first.expand(batch_shape), self.step.expand(batch_shape)
        return RandomWalk(first, step, self.event_shape[0])

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        noise = torch.randn(self.shape(torch.Size(sample_shape))).to(self.step)
        first = self.first[..., None] * noise[..., :1]
        return torch.cat([first, self.step[..., None] * noise[..., 1:]], -1).cumsum(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        first = dist.Normal(0.0, self.first).log_prob(x[..., 0])
        return first + dist.Normal(x[..., :-1], self.step[..., None]).log_prob(x[..., 1:]).sum(-1)


def simulate(groups: int = TIMES, seed: int = 0) -> tuple[Tensor]:
    """Measurement at each time, (groups,)."""
    rng = np.random.default_rng(seed)
    level = np.cumsum(rng.normal(0.0, 0.3, groups))
    return (torch.tensor(rng.normal(level, 1.0)),)


def data() -> tuple[Tensor]:
    """Measurements at 1000 times."""
    return simulate()


def model(y: Tensor) -> None:
    zero = y.new_zeros(())
    step = pyro.sample("step", dist.HalfNormal(zero + 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(zero + 2.0))
    level = pyro.sample("level", RandomWalk(zero + 5.0, step, len(y)))
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(level, noise), obs=y)

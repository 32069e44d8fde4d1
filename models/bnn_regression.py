"""A network of 6 units on one input with a gap in the data: its uncertainty grows in the gap.

Foong, Li, Hernandez-Lobato and Turner (2019), "'In-Between' Uncertainty in Bayesian Neural
Networks", arXiv:1906.11537, ask whether a guide shows it.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

UNITS = 6


def data() -> tuple[Tensor, Tensor]:
    """Inputs in [-1, -0.4] and [0.4, 1], and noisy values of a wave, each (40,)."""
    generator = torch.Generator().manual_seed(0)
    side = torch.linspace(0.4, 1.0, 20, dtype=torch.float64)
    x = torch.cat([-side.flip(0), side])
    noise = torch.randn(40, generator=generator, dtype=torch.float64)
    return x, torch.sin(4 * x) + 0.1 * noise


def model(x: Tensor, y: Tensor | None = None) -> None:
    zero = x.new_zeros(())  # priors take their precision from the data
    with pyro.plate("unit", UNITS):
        slope = pyro.sample("slope", dist.Normal(zero, 3.0))
        shift = pyro.sample("shift", dist.Normal(zero, 2.0))
        weight = pyro.sample("weight", dist.Normal(zero, UNITS**-0.5))
    level = pyro.sample("level", dist.Normal(zero, 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(zero + 0.3))
    with pyro.plate("row", len(x)):
        hidden = torch.tanh(x[:, None] * slope + shift)
        mean = pyro.deterministic("mean", hidden @ weight + level)
        pyro.sample("y", dist.Normal(mean, noise), obs=y)

"""A network of 5 units that tells two interleaved half circles apart."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

UNITS = 5


def data() -> tuple[Tensor, Tensor]:
    """Points of two half circles with noise, (60, 2), and which one each is of, (60,)."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.linspace(0, math.pi, 30, dtype=torch.float64)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    noise = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    return torch.cat([upper, lower]) + 0.15 * noise, torch.arange(60).ge(30).double()


def model(x: Tensor, y: Tensor | None = None) -> None:
    zero = x.new_zeros(())  # priors take their precision from the data
    with pyro.plate("unit", UNITS):
        shift = pyro.sample("shift", dist.Normal(zero, 2.0))
        weight = pyro.sample("weight", dist.Normal(zero, 2.0))
        slope = pyro.sample("slope", dist.Normal(x.new_zeros(2), 2.0).to_event(1))
    level = pyro.sample("level", dist.Normal(zero, 1.0))
    with pyro.plate("row", len(x)):
        hidden = torch.tanh(x @ slope.mT + shift)
        logit = pyro.deterministic("logit", hidden @ weight + level)
        pyro.sample("y", dist.Bernoulli(logits=logit), obs=y)

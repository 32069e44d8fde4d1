"""Mixture of two normals, poorly separated, labels free: two symmetric regions, one bridge.

Betancourt (2017), "Identifying Bayesian mixture models"; posteriordb's
low_dim_gauss_mix_collapse-low_dim_gauss_mix_collapse (simulated data).
"""

import json
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def data(path: str) -> tuple[Tensor]:
    """The observations, (1000,)."""
    raw = json.loads(Path(path).read_text())
    return (torch.tensor(raw["y"], dtype=torch.float64),)


def model(y: Tensor) -> None:
    zero = y.new_zeros(())
    with pyro.plate("component", 2):
        mu = pyro.sample("mu", dist.Normal(zero, 2.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(zero + 2.0))
    theta = pyro.sample("theta", dist.Beta(zero + 5.0, 5.0))

    weight = dist.Categorical(torch.stack([theta, 1.0 - theta]))
    with pyro.plate("observation", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(weight, dist.Normal(mu, sigma)), obs=y)

"""Earnings on height, raw scales and flat priors: badly scaled, correlation -0.998.

Gelman and Hill (2007), "Data Analysis Using Regression and Multilevel/Hierarchical Models",
chapter 4; posteriordb's earnings-earn_height.
"""

import json
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor


def data(path: str) -> tuple[Tensor, Tensor]:
    """Design matrix (1, height), (1192, 2), and yearly earnings, (1192,)."""
    raw = json.loads(Path(path).read_text())
    height = torch.tensor(raw["height"], dtype=torch.float64)
    earn = torch.tensor(raw["earn"], dtype=torch.float64)
    return torch.stack([torch.ones_like(height), height], dim=-1), earn


def model(design: Tensor, earn: Tensor) -> None:
    with pyro.plate("coefficient", design.shape[-1]):
        beta = pyro.sample("beta", dist.ImproperUniform(constraints.real, (), ()))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("person", len(earn)):
        pyro.sample("earn", dist.Normal(design @ beta, sigma), obs=earn)


coords = {"coefficient": ["intercept", "height"]}

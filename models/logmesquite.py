"""Leaf biomass of mesquite bushes, log-log regression on few data with flat priors.

Gelman and Hill (2007), "Data Analysis Using Regression and Multilevel/Hierarchical Models",
section 4.6; posteriordb's mesquite-logmesquite.
"""

import json
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

LOGGED = ["diam1", "diam2", "canopy_height", "total_height", "density"]


def data(path: str) -> tuple[Tensor, Tensor]:
    """Design matrix (1, five logarithms, group), (46, 7), and log weight, (46,)."""
    raw = json.loads(Path(path).read_text())
    columns = {name: torch.tensor(raw[name], dtype=torch.float64) for name in raw}
    log_weight = columns["weight"].log()
    logs = [columns[name].log() for name in LOGGED]
    design = torch.stack([torch.ones_like(log_weight), *logs, columns["group"]], dim=-1)
    return design, log_weight


def model(design: Tensor, log_weight: Tensor) -> None:
    with pyro.plate("coefficient", design.shape[-1]):
        beta = pyro.sample("beta", dist.ImproperUniform(constraints.real, (), ()))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("bush", len(log_weight)):
        pyro.sample("log_weight", dist.Normal(design @ beta, sigma), obs=log_weight)


coords = {"coefficient": ["intercept", *(f"log {name}" for name in LOGGED), "group"]}

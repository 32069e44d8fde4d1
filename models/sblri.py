"""Linear regression whose posterior is ten thousand times narrower than its prior.

posteriordb's sblri-blr (simulated data).
"""

import json
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def data(path: str) -> tuple[Tensor, Tensor]:
    """Predictors, (100, 5), and the response, (100,)."""
    raw = json.loads(Path(path).read_text())
    return torch.tensor(raw["X"], dtype=torch.float64), torch.tensor(raw["y"], dtype=torch.float64)


def model(predictors: Tensor, response: Tensor) -> None:
    zero = predictors.new_zeros(())
    with pyro.plate("coefficient", predictors.shape[-1]):
        beta = pyro.sample("beta", dist.Normal(zero, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(zero + 10.0))
    with pyro.plate("observation", len(response)):
        pyro.sample("y", dist.Normal(predictors @ beta, sigma), obs=response)

"""Log price of diamonds on 24 highly correlated predictors: condition number 3e5.

Bales, Pourzanjani, Vehtari and Petzold (2019), "Selecting the metric in Hamiltonian Monte Carlo",
arXiv:1905.11916; the data are from Wickham's ggplot2; posteriordb's diamonds-diamonds.
"""

import json
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def data(path: str) -> tuple[Tensor, Tensor]:
    """Centred predictors without the column of ones, (5000, 24), and log price, (5000,)."""
    raw = json.loads(Path(path).read_text())
    predictors = torch.tensor(raw["X"], dtype=torch.float64)[:, 1:]
    return predictors - predictors.mean(0), torch.tensor(raw["Y"], dtype=torch.float64)


def model(predictors: Tensor, log_price: Tensor) -> None:
    zero = predictors.new_zeros(())
    with pyro.plate("coefficient", predictors.shape[-1]):
        b = pyro.sample("b", dist.Normal(zero, 1.0))
    intercept = pyro.sample("Intercept", dist.StudentT(3.0, zero + 8.0, 10.0))
    half_t = dist.FoldedDistribution(dist.StudentT(3.0, zero, 10.0))
    sigma = pyro.sample("sigma", half_t)
    with pyro.plate("diamond", len(log_price)):
        pyro.sample("Y", dist.Normal(intercept + predictors @ b, sigma), obs=log_price)

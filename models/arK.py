"""Autoregression of order 5 on a simulated series, without a stationarity constraint.

The Stan team's stat_comp_benchmarks; posteriordb's arK-arK.
"""

import json
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def data(path: str) -> tuple[Tensor, Tensor]:
    """The K previous values, latest first, (T - K, K), and the series after its start, (T - K,)."""
    raw = json.loads(Path(path).read_text())
    series, order = torch.tensor(raw["y"], dtype=torch.float64), raw["K"]
    return series[:-1].unfold(0, order, 1).flip(-1), series[order:]


def model(previous: Tensor, series: Tensor) -> None:
    zero = series.new_zeros(())
    alpha = pyro.sample("alpha", dist.Normal(zero, 10.0))
    with pyro.plate("lag", previous.shape[-1]):
        beta = pyro.sample("beta", dist.Normal(zero, 10.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(zero + 2.5))
    with pyro.plate("time", len(series)):
        pyro.sample("y", dist.Normal(alpha + previous @ beta, sigma), obs=series)


coords = {"lag": [1, 2, 3, 4, 5]}

"""GARCH(1,1): volatility that follows the last shock and the last volatility.

Bollerslev (1986), "Generalized autoregressive conditional heteroskedasticity", Journal of
Econometrics 31; posteriordb's garch-garch11 (simulated data).
"""

import json
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor


def data(path: str) -> tuple[Tensor, Tensor]:
    """The series, (T,), and its known first standard deviation, ()."""
    raw = json.loads(Path(path).read_text())
    return torch.tensor(raw["y"], dtype=torch.float64), torch.tensor(
        raw["sigma1"], dtype=torch.float64
    )


def model(series: Tensor, sigma1: Tensor) -> None:
    zero = series.new_zeros(())
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    alpha0 = pyro.sample("alpha0", dist.ImproperUniform(constraints.positive, (), ()))
    # Together uniform over the triangle alpha1 + beta1 < 1.
    alpha1 = pyro.sample("alpha1", dist.Beta(zero + 1.0, 2.0))
    beta1 = pyro.sample("beta1", dist.Uniform(zero, 1.0 - alpha1))

    shock = alpha0 + alpha1 * (series[:-1] - mu) ** 2
    variance = decayed_sum(torch.cat([sigma1.square()[None], shock]), beta1)
    with pyro.plate("time", len(series)):
        pyro.sample("y", dist.Normal(mu, variance.sqrt()), obs=series)


def decayed_sum(x: Tensor, decay: Tensor) -> Tensor:
    """Solve h_t = x_t + decay * h_(t-1), (T,) -> (T,), in log2(T) steps.

    Before each step, h_t holds the last `lag` terms of its sum.
    """
    h, lag = x, 1
    while lag < len(x):
        h = torch.cat([h[:lag], h[lag:] + decay * h[:-lag]])
        decay, lag = decay * decay, 2 * lag
    return h

r"""Conjugate Bayesian linear regression on generated data, with its exact posterior.

.. math::
    \sigma^2 \sim \mathrm{InvGamma}(a, b), \quad
    \beta \mid \sigma^2 \sim \mathrm{N}(0, \sigma^2 s^2 I), \quad
    y \mid \beta, \sigma^2 \sim \mathrm{N}(X \beta, \sigma^2 I)

Bishop (2006), "Pattern Recognition and Machine Learning", section 3.3 and exercise 3.12.
"""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

SHAPE, RATE = 3.0, 2.0  # a and b
SPREAD = 2.0  # s


def data() -> tuple[Tensor, Tensor]:
    """Predictors with a leading 1, (100, 4), and the response, (100,)."""
    rng = np.random.default_rng(20)
    predictors = np.column_stack([np.ones(100), rng.normal(size=(100, 3))])
    # A shared part correlates the last two coefficients.
    predictors[:, 3] += 2.0 * predictors[:, 2]
    response = predictors @ [1.0, -0.5, 2.0, 0.3] + 0.8 * rng.normal(size=100)
    return torch.tensor(predictors), torch.tensor(response)


def model(predictors: Tensor, response: Tensor) -> None:
    zero = predictors.new_zeros(())
    sigma2 = pyro.sample("sigma2", dist.InverseGamma(zero + SHAPE, zero + RATE))
    sigma = sigma2.sqrt()
    with pyro.plate("coefficient", predictors.shape[-1]):
        beta = pyro.sample("beta", dist.Normal(zero, SPREAD * sigma))
    with pyro.plate("observation", len(response)):
        pyro.sample("y", dist.Normal(predictors @ beta, sigma), obs=response)


coords = {"coefficient": ["intercept", "x1", "x2", "x3"]}


def reference() -> dict[str, Any]:
    """Exact: the posterior is normal-inverse-gamma again, so beta is a multivariate t."""
    predictors, response = (x.numpy() for x in data())
    n, d = predictors.shape
    precision = predictors.T @ predictors + np.eye(d) / SPREAD**2
    mean = np.linalg.solve(precision, predictors.T @ response)
    shape = SHAPE + n / 2
    rate = RATE + (response @ response - mean @ precision @ mean) / 2
    sigma2 = rate / (shape - 1)
    log_evidence = (
        math.lgamma(shape)
        - math.lgamma(SHAPE)
        + SHAPE * math.log(RATE)
        - shape * math.log(rate)
        - n / 2 * math.log(2 * math.pi)
        - np.linalg.slogdet(precision).logabsdet / 2
        - d * math.log(SPREAD)
    )
    return {
        "log_evidence": float(log_evidence),
        "mean": {"beta": mean.tolist(), "sigma2": sigma2},
        "sd": {
            "beta": np.sqrt(sigma2 * np.diag(np.linalg.inv(precision))).tolist(),
            "sigma2": sigma2 / math.sqrt(shape - 2),
        },
    }

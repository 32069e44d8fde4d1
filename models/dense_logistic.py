"""Logistic regression on correlated predictors, with a plate of coefficients.

A model of many latents without local ones: every row of the data depends on every coefficient.
Generated data.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

COEFFICIENTS, ROWS = 60, 10


def simulate(groups: int = COEFFICIENTS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Predictors, (10 groups, groups), and outcome (0 or 1) of each row."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS * groups, groups)) + 0.5 * rng.normal(size=(ROWS * groups, 1))
    logit = x @ rng.normal(0.0, 1 / np.sqrt(groups), groups)
    outcome = rng.random(len(x)) < 1 / (1 + np.exp(-logit))
    return torch.tensor(x), torch.tensor(outcome.astype(float))


def data() -> tuple[Tensor, Tensor]:
    """600 rows of 60 predictors, and their outcomes."""
    return simulate()


def model(x: Tensor, outcome: Tensor) -> None:
    zero = x.new_zeros(())
    scale = pyro.sample("scale", dist.HalfNormal(zero + 1.0))
    with pyro.plate("coefficient", x.shape[1]):
        w = pyro.sample("w", dist.Normal(zero, scale))
    with pyro.plate("row", len(outcome)):
        pyro.sample("outcome", dist.Bernoulli(logits=x @ w), obs=outcome)

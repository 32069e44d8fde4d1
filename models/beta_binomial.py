"""Probabilities of groups with a beta distribution, and a binomial count of each.

The shape of the rat tumour experiments; generated data. Gelman et al. (2013), "Bayesian Data
Analysis", section 5.3. Its evidence and moments are known by quadrature over two numbers.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

GROUPS = 100


def simulate(groups: int = GROUPS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Number of trials and of successes, each (groups,)."""
    rng = np.random.default_rng(seed)
    trials = rng.integers(10, 50, groups)
    p = rng.beta(2.4, 9.6, groups)
    return torch.tensor(trials.astype(float)), torch.tensor(rng.binomial(trials, p).astype(float))


def data() -> tuple[Tensor, Tensor]:
    """Number of trials and of successes of 100 groups."""
    return simulate()


def model(trials: Tensor, successes: Tensor) -> None:
    zero = trials.new_zeros(())
    mean = pyro.sample("mean", dist.Beta(zero + 2.0, zero + 2.0))
    size = pyro.sample("size", dist.LogNormal(zero + 2.0, 1.0))
    with pyro.plate("group", len(trials)):
        p = pyro.sample("p", dist.Beta(mean * size, (1 - mean) * size))
        pyro.sample("successes", dist.Binomial(trials, p), obs=successes)

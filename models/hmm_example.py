"""Hidden Markov model with two states and normal emissions; the path is summed out.

Ali (2019), "Tagging basketball events with HMM in Stan"; posteriordb's hmm_example-hmm_example
(simulated data).
"""

import json
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor


def data(path: str) -> tuple[Tensor]:
    """The series, (100,)."""
    raw = json.loads(Path(path).read_text())
    return (torch.tensor(raw["y"], dtype=torch.float64),)


def model(y: Tensor) -> None:
    theta1 = pyro.sample("theta1", dist.Dirichlet(y.new_ones(2)))
    theta2 = pyro.sample("theta2", dist.Dirichlet(y.new_ones(2)))
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.positive_ordered_vector, (), (2,)))
    pyro.factor("mu_prior", dist.Normal(y.new_tensor([3.0, 10.0]), 1.0).log_prob(mu).sum(-1))

    log_emission = dist.Normal(mu, 1.0).log_prob(y[:, None])  # (T, 2)
    log_step = torch.stack([theta1, theta2]).log() + log_emission[1:, None, :]  # (T - 1, 2, 2)
    log_paths = log_emission[0, :, None] + log_product(log_step)  # first state by last state
    pyro.factor("y", log_paths.logsumexp((-2, -1)))


def log_product(log_m: Tensor) -> Tensor:
    """Log of the product of T matrices given by their logs, (T, K, K) -> (K, K), in log2(T) steps.

    The forward algorithm, with neighbours multiplied pairwise instead of from the left.
    """
    while len(log_m) > 1:
        left, right = log_m[0:-1:2], log_m[1::2]
        pairs = (left[:, :, :, None] + right[:, None, :, :]).logsumexp(-2)
        log_m = torch.cat([pairs, log_m[2 * len(pairs) :]])  # an odd one out waits
    return log_m[0]

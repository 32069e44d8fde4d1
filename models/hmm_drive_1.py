"""Two kinds of movement in a basketball player's drive: a hidden Markov model of two series.

Ali (2019), "Tagging basketball events with HMM in Stan"; posteriordb's
bball_drive_event_1-hmm_drive_1.
"""

import json
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor


def data(path: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two series u and v, (416,), their known sds, (), and the rows' Dirichlet weights, (2, 2)."""
    raw = json.loads(Path(path).read_text())
    u, v, tau, rho, alpha = (
        torch.tensor(raw[name], dtype=torch.float64) for name in ("u", "v", "tau", "rho", "alpha")
    )
    return u, v, tau, rho, alpha


def model(u: Tensor, v: Tensor, tau: Tensor, rho: Tensor, alpha: Tensor) -> None:
    theta1 = pyro.sample("theta1", dist.Dirichlet(alpha[0]))
    theta2 = pyro.sample("theta2", dist.Dirichlet(alpha[1]))
    phi = pyro.sample("phi", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    lam = pyro.sample("lambda", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    prior = dist.Normal(u.new_tensor([0.0, 3.0]), 1.0)
    pyro.factor("prior", (prior.log_prob(phi) + prior.log_prob(lam)).sum(-1))

    log_u = dist.Normal(phi, tau).log_prob(u[:, None])
    log_v = dist.Normal(lam, rho).log_prob(v[:, None])
    log_emission = log_u + log_v  # (T, 2)
    log_step = torch.stack([theta1, theta2]).log() + log_emission[1:, None, :]  # (T - 1, 2, 2)
    log_paths = log_emission[0, :, None] + log_product(log_step)  # first state by last state
    pyro.factor("u_v", log_paths.logsumexp((-2, -1)))


def log_product(log_m: Tensor) -> Tensor:
    """Log of the product of T matrices given by their logs, (T, K, K) -> (K, K), in log2(T) steps.

    The forward algorithm, with neighbours multiplied pairwise instead of from the left.
    """
    while len(log_m) > 1:
        left, right = log_m[0:-1:2], log_m[1::2]
        pairs = (left[:, :, :, None] + right[:, None, :, :]).logsumexp(-2)
        log_m = torch.cat([pairs, log_m[2 * len(pairs) :]])  # an odd one out waits
    return log_m[0]

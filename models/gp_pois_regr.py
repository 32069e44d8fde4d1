"""Gaussian process on the log rate of Poisson counts, with unknown length scale and amplitude.

Rasmussen and Williams (2006), "Gaussian Processes for Machine Learning"; the Stan
team's stat_comp_benchmarks; posteriordb's gp_pois_regr-gp_pois_regr.
"""

import json
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def data(path: str) -> tuple[Tensor, Tensor]:
    """Inputs and counts, each (11,)."""
    raw = json.loads(Path(path).read_text())
    return torch.tensor(raw["x"], dtype=torch.float64), torch.tensor(raw["k"], dtype=torch.float64)


def model(x: Tensor, count: Tensor) -> None:
    zero = x.new_zeros(())
    rho = pyro.sample("rho", dist.Gamma(zero + 25.0, zero + 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(zero + 2.0))

    distance = (x[:, None] - x) / rho
    jitter = 1e-10 * torch.eye(len(x)).to(x)  # enough in double precision only
    covariance = alpha**2 * torch.exp(-(distance**2) / 2) + jitter
    cholesky = torch.linalg.cholesky(covariance)
    with pyro.plate("point", len(x)):
        f_tilde = pyro.sample("f_tilde", dist.Normal(zero, 1.0))
        f = pyro.deterministic("f", cholesky @ f_tilde)
        pyro.sample("k", dist.Poisson(f.exp()), obs=count)

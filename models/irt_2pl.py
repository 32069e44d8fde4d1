"""Item response: difficulty and discrimination of 20 items, ability of 100 persons.

Birnbaum (1968), "Some latent trait models and their use in inferring an examinee's ability";
posteriordb's irt_2pl-irt_2pl (simulated data).
"""

import json
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def data(path: str) -> tuple[Tensor]:
    """Answers, 1 when right: a row for each person and a column for each item, (100, 20)."""
    raw = json.loads(Path(path).read_text())
    return (torch.tensor(raw["y"], dtype=torch.float64).T,)


def model(right: Tensor) -> None:
    persons, items = right.shape
    zero = right.new_zeros(())
    sigma_theta = pyro.sample("sigma_theta", dist.HalfCauchy(zero + 2.0))
    theta = pyro.sample("theta", dist.Normal(zero, sigma_theta).expand([persons]).to_event(1))
    sigma_a = pyro.sample("sigma_a", dist.HalfCauchy(zero + 2.0))
    mu_b = pyro.sample("mu_b", dist.Normal(zero, 5.0))
    sigma_b = pyro.sample("sigma_b", dist.HalfCauchy(zero + 2.0))
    with pyro.plate("item", items):
        a = pyro.sample("a", dist.LogNormal(zero, sigma_a))
        b = pyro.sample("b", dist.Normal(mu_b, sigma_b))
        with pyro.plate("person", persons):
            logits = a * (theta[:, None] - b)
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=right)

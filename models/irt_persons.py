"""Item response of many persons: ability of each, difficulty and discrimination of 20 items.

Birnbaum (1968), "Some latent trait models and their use in inferring an examinee's ability". The
scale of abilities is fixed, as in most software for tests. Generated data.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

PERSONS, ITEMS = 500, 20


def simulate(groups: int = PERSONS, seed: int = 0) -> tuple[Tensor]:
    """Answers, 1 when right: a row for each person and a column for each item, (groups, 20)."""
    rng = np.random.default_rng(seed)
    a, b = np.exp(rng.normal(0.0, 0.4, ITEMS)), rng.normal(0.0, 1.0, ITEMS)
    logit = a * (rng.normal(size=(groups, 1)) - b)
    return (torch.tensor((rng.random(logit.shape) < 1 / (1 + np.exp(-logit))).astype(float)),)


def data() -> tuple[Tensor]:
    """Answers of 500 persons to 20 items, (500, 20)."""
    return simulate()


def model(right: Tensor) -> None:
    persons, items = right.shape
    zero = right.new_zeros(())
    item = pyro.plate("item", items, dim=-1)
    with item:
        a = pyro.sample("a", dist.LogNormal(zero, 0.5))
        b = pyro.sample("b", dist.Normal(zero, 2.0))
    with pyro.plate("person", persons, dim=-2):
        ability = pyro.sample("ability", dist.Normal(zero, 1.0))
        with item:
            pyro.sample("right", dist.Bernoulli(logits=a * (ability - b)), obs=right)

"""The models of models/ as Pyro's guides can take them."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor


def garch11(module: ModuleType) -> Callable[..., Any]:
    """Pyro's guides would keep the support that `beta1` has at the first value of `alpha1`."""

    def model(series: Tensor, sigma1: Tensor) -> None:
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
        alpha0 = pyro.sample("alpha0", dist.ImproperUniform(constraints.positive, (), ()))
        shares = pyro.sample("shares", dist.Dirichlet(series.new_ones(3)))
        alpha1 = pyro.deterministic("alpha1", shares[0])
        beta1 = pyro.deterministic("beta1", shares[1])
        shock = alpha0 + alpha1 * (series[:-1] - mu) ** 2
        variance = module.decayed_sum(torch.cat([sigma1.square()[None], shock]), beta1)
        with pyro.plate("time", len(series)):
            pyro.sample("y", dist.Normal(mu, variance.sqrt()), obs=series)

    return model


def model_of(name: str, module: ModuleType) -> Callable[..., Any]:
    """The file's own model, but for the one whose support depends on a latent."""
    found: Callable[..., Any] = garch11(module) if name == "garch11" else module.model
    return found

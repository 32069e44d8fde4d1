"""Likelihoods: what the output of a network says about a row of the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
from torch import Tensor

# Output of the network, (rows, *outputs), to the distribution of the rows; may sample sites.
Likelihood = Callable[[Tensor], dist.TorchDistribution]


@dataclass(frozen=True)
class Gaussian:
    r"""Normal with one unknown standard deviation, the site ``noise``.

    .. math:: \sigma \sim N^+(0, s^2), \qquad y \sim N(f(x), \sigma^2)

    Args:
        scale: Scale s of the half-normal; about the spread of y.
    """

    scale: float = 1.0

    def __call__(self, output: Tensor) -> dist.TorchDistribution:
        noise = pyro.sample("noise", dist.HalfNormal(output.new_tensor(self.scale)))
        return dist.Normal(output, noise)


def categorical(output: Tensor) -> dist.TorchDistribution:
    """Classes, from one logit each."""
    return dist.Categorical(logits=output)


def bernoulli(output: Tensor) -> dist.TorchDistribution:
    """Zeros and ones, from the logit of a one."""
    return dist.Bernoulli(logits=output)


def poisson(output: Tensor) -> dist.TorchDistribution:
    """Counts, from the logarithm of their mean."""
    return dist.Poisson(output.exp())


LIKELIHOODS: dict[str, Likelihood] = {
    "bernoulli": bernoulli,
    "categorical": categorical,
    "gaussian": Gaussian(),
    "poisson": poisson,
}

"""Networks whose weights are latent variables: models, priors of weights, likelihoods.

`PRIORS` and `LIKELIHOODS` map a name to a builder whose arguments all have defaults.
"""

from flowvi.bnn.bayesian import Bayesian, bayesian
from flowvi.bnn.likelihoods import LIKELIHOODS, Gaussian, Likelihood
from flowvi.bnn.priors import (
    PRIORS,
    Hierarchical,
    Horseshoe,
    Laplace,
    Normal,
    Prior,
    UnitScales,
    Weight,
)

__all__ = [
    "LIKELIHOODS",
    "PRIORS",
    "Bayesian",
    "Gaussian",
    "Hierarchical",
    "Horseshoe",
    "Laplace",
    "Likelihood",
    "Normal",
    "Prior",
    "UnitScales",
    "Weight",
    "bayesian",
]

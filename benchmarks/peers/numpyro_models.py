"""The regressions and hierarchies of models/ for NumPyro, on the data of the Pyro models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints


def ark(previous: np.ndarray, series: np.ndarray) -> None:
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    with numpyro.plate("lag", previous.shape[-1]):
        beta = numpyro.sample("beta", dist.Normal(0.0, 10.0))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(alpha + previous @ beta, sigma), obs=series)


def diamonds(predictors: np.ndarray, log_price: np.ndarray) -> None:
    with numpyro.plate("coefficient", predictors.shape[-1]):
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    intercept = numpyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = numpyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 10.0)))
    numpyro.sample("Y", dist.Normal(intercept + predictors @ b, sigma), obs=log_price)


def eight_schools_centered(effect: np.ndarray, error: np.ndarray) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(effect)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, error), obs=effect)


def eight_schools_noncentered(effect: np.ndarray, error: np.ndarray) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(effect)):
        theta_trans = numpyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = numpyro.deterministic("theta", mu + tau * theta_trans)
        numpyro.sample("y", dist.Normal(theta, error), obs=effect)


def flat_regression(design: np.ndarray, response: np.ndarray) -> None:
    """`earn_height`, `logmesquite` and `nes1980`: flat in the coefficients and in sigma."""
    with numpyro.plate("coefficient", design.shape[-1]):
        beta = numpyro.sample("beta", dist.ImproperUniform(constraints.real, (), ()))
    sigma = numpyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    numpyro.sample("y", dist.Normal(design @ beta, sigma), obs=response)


def irt_2pl(right: np.ndarray) -> None:
    persons, items = right.shape
    sigma_theta = numpyro.sample("sigma_theta", dist.HalfCauchy(2.0))
    with numpyro.plate("ability", persons):
        theta = numpyro.sample("theta", dist.Normal(0.0, sigma_theta))
    sigma_a = numpyro.sample("sigma_a", dist.HalfCauchy(2.0))
    mu_b = numpyro.sample("mu_b", dist.Normal(0.0, 5.0))
    sigma_b = numpyro.sample("sigma_b", dist.HalfCauchy(2.0))
    with numpyro.plate("item", items):
        a = numpyro.sample("a", dist.LogNormal(0.0, sigma_a))
        b = numpyro.sample("b", dist.Normal(mu_b, sigma_b))
    numpyro.sample("y", dist.Bernoulli(logits=a * (theta[:, None] - b)), obs=right)


def kidscore_interaction(design: np.ndarray, score: np.ndarray) -> None:
    with numpyro.plate("coefficient", design.shape[-1]):
        beta = numpyro.sample("beta", dist.ImproperUniform(constraints.real, (), ()))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("kid_score", dist.Normal(design @ beta, sigma), obs=score)


def sblri(predictors: np.ndarray, response: np.ndarray) -> None:
    with numpyro.plate("coefficient", predictors.shape[-1]):
        beta = numpyro.sample("beta", dist.Normal(0.0, 10.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    numpyro.sample("y", dist.Normal(predictors @ beta, sigma), obs=response)


MODELS: dict[str, Callable[..., Any]] = {
    "arK": ark,
    "diamonds": diamonds,
    "earn_height": flat_regression,
    "eight_schools_centered": eight_schools_centered,
    "eight_schools_noncentered": eight_schools_noncentered,
    "irt_2pl": irt_2pl,
    "kidscore_interaction": kidscore_interaction,
    "logmesquite": flat_regression,
    "nes1980": flat_regression,
    "sblri": sblri,
}

"""The regressions and hierarchies of models/ for PyMC, on the data of the Pyro models."""

# Each is called within `with pm.Model()`, to which it adds its variables.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pymc as pm


def ark(previous: np.ndarray, series: np.ndarray) -> None:
    alpha = pm.Normal("alpha", 0.0, 10.0)
    beta = pm.Normal("beta", 0.0, 10.0, shape=previous.shape[-1])
    sigma = pm.HalfCauchy("sigma", 2.5)
    pm.Normal("y", alpha + previous @ beta, sigma, observed=series)


def diamonds(predictors: np.ndarray, log_price: np.ndarray) -> None:
    b = pm.Normal("b", 0.0, 1.0, shape=predictors.shape[-1])
    intercept = pm.StudentT("Intercept", nu=3.0, mu=8.0, sigma=10.0)
    sigma = pm.HalfStudentT("sigma", nu=3.0, sigma=10.0)
    pm.Normal("Y", intercept + predictors @ b, sigma, observed=log_price)


def eight_schools_centered(effect: np.ndarray, error: np.ndarray) -> None:
    mu = pm.Normal("mu", 0.0, 5.0)
    tau = pm.HalfCauchy("tau", 5.0)
    theta = pm.Normal("theta", mu, tau, shape=len(effect))
    pm.Normal("y", theta, error, observed=effect)


def eight_schools_noncentered(effect: np.ndarray, error: np.ndarray) -> None:
    mu = pm.Normal("mu", 0.0, 5.0)
    tau = pm.HalfCauchy("tau", 5.0)
    theta_trans = pm.Normal("theta_trans", 0.0, 1.0, shape=len(effect))
    theta = pm.Deterministic("theta", mu + tau * theta_trans)
    pm.Normal("y", theta, error, observed=effect)


def flat_regression(design: np.ndarray, response: np.ndarray) -> None:
    """`earn_height`, `logmesquite` and `nes1980`: flat in the coefficients and in sigma."""
    beta = pm.Flat("beta", shape=design.shape[-1])
    sigma = pm.HalfFlat("sigma")
    pm.Normal("y", design @ beta, sigma, observed=response)


def irt_2pl(right: np.ndarray) -> None:
    persons, items = right.shape
    sigma_theta = pm.HalfCauchy("sigma_theta", 2.0)
    theta = pm.Normal("theta", 0.0, sigma_theta, shape=persons)
    sigma_a = pm.HalfCauchy("sigma_a", 2.0)
    mu_b = pm.Normal("mu_b", 0.0, 5.0)
    sigma_b = pm.HalfCauchy("sigma_b", 2.0)
    a = pm.LogNormal("a", 0.0, sigma_a, shape=items)
    b = pm.Normal("b", mu_b, sigma_b, shape=items)
    pm.Bernoulli("y", logit_p=a * (theta[:, None] - b), observed=right)


def kidscore_interaction(design: np.ndarray, score: np.ndarray) -> None:
    beta = pm.Flat("beta", shape=design.shape[-1])
    sigma = pm.HalfCauchy("sigma", 2.5)
    pm.Normal("kid_score", design @ beta, sigma, observed=score)


def sblri(predictors: np.ndarray, response: np.ndarray) -> None:
    beta = pm.Normal("beta", 0.0, 10.0, shape=predictors.shape[-1])
    sigma = pm.HalfNormal("sigma", 10.0)
    pm.Normal("y", predictors @ beta, sigma, observed=response)


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

"""The series, mixtures and processes of models/ for PyMC, on the data of the Pyro models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pymc as pm
import pytensor
import pytensor.tensor as pt
from pymc.distributions.transforms import Chain, log, ordered

STEPS = 10  # Runge-Kutta steps in a year


def garch11(series: np.ndarray, sigma1: np.ndarray) -> None:
    mu = pm.Flat("mu")
    alpha0 = pm.HalfFlat("alpha0")
    # Uniform over the triangle; ADVI needs supports that depend on no latent.
    shares = pm.Dirichlet("shares", np.ones(3))
    alpha1 = pm.Deterministic("alpha1", shares[0])
    beta1 = pm.Deterministic("beta1", shares[1])
    shock = alpha0 + alpha1 * (series[:-1] - mu) ** 2
    first = pt.as_tensor(sigma1[None] ** 2)
    variance = decayed_sum(pt.concatenate([first, shock]), beta1, len(series))
    pm.Normal("y", mu, pt.sqrt(variance), observed=series)


def decayed_sum(x: Any, decay: Any, length: int) -> Any:
    """Solve h_t = x_t + decay * h_(t-1), (T,) -> (T,), in log2(T) steps."""
    h, lag = x, 1
    while lag < length:
        h = pt.concatenate([h[:lag], h[lag:] + decay * h[:-lag]])
        decay, lag = decay * decay, 2 * lag
    return h


def gp_pois_regr(x: np.ndarray, count: np.ndarray) -> None:
    rho = pm.Gamma("rho", alpha=25.0, beta=4.0)
    alpha = pm.HalfNormal("alpha", 2.0)
    distance = (x[:, None] - x) / rho
    covariance = alpha**2 * pt.exp(-(distance**2) / 2) + 1e-10 * np.eye(len(x))
    f_tilde = pm.Normal("f_tilde", 0.0, 1.0, shape=len(x))
    f = pm.Deterministic("f", pt.linalg.cholesky(covariance) @ f_tilde)
    pm.Poisson("k", pt.exp(f), observed=count)


def hmm_drive_1(
    u: np.ndarray, v: np.ndarray, tau: np.ndarray, rho: np.ndarray, alpha: np.ndarray
) -> None:
    theta1 = pm.Dirichlet("theta1", alpha[0])
    theta2 = pm.Dirichlet("theta2", alpha[1])
    middle = np.array([0.0, 3.0])
    phi = pm.Normal("phi", middle, 1.0, transform=ordered, initval=middle)
    lam = pm.Normal("lambda", middle, 1.0, transform=ordered, initval=middle)
    log_u = pm.logp(pm.Normal.dist(phi, tau), u[:, None])
    log_v = pm.logp(pm.Normal.dist(lam, rho), v[:, None])
    pm.Potential("u_v", log_marginal(pt.stack([theta1, theta2]), log_u + log_v, len(u)))


def hmm_example(y: np.ndarray) -> None:
    theta1 = pm.Dirichlet("theta1", np.ones(2))
    theta2 = pm.Dirichlet("theta2", np.ones(2))
    middle = np.array([3.0, 10.0])
    mu = pm.Normal("mu", middle, 1.0, transform=Chain([log, ordered]), initval=middle)
    log_emission = pm.logp(pm.Normal.dist(mu, 1.0), y[:, None])
    pm.Potential("y", log_marginal(pt.stack([theta1, theta2]), log_emission, len(y)))


def log_marginal(transition: Any, log_emission: Any, length: int) -> Any:
    """Sum over all paths, for (K, K) and (T, K), by products of neighbours in log2(T) steps."""
    log_m, count = pt.log(transition) + log_emission[1:, None, :], length - 1
    while count > 1:
        left, right = log_m[0 : count - 1 : 2], log_m[1:count:2]
        pairs = pt.logsumexp(left[:, :, :, None] + right[:, None, :, :], axis=-2)
        half = count // 2
        log_m = pt.concatenate([pairs, log_m[2 * half :]])  # an odd one out waits
        count -= half
    return pt.logsumexp(log_emission[0, :, None] + log_m[0])


def lotka_volterra(y_init: np.ndarray, y: np.ndarray) -> None:
    middle, spread = np.array([[1.0, 0.05, 1.0, 0.05], [0.5, 0.05, 0.5, 0.05]])
    theta = pm.TruncatedNormal("theta", middle, spread, lower=0.0, shape=4)
    z_init = pm.LogNormal("z_init", math.log(10.0), 1.0, shape=2)
    sigma = pm.LogNormal("sigma", -1.0, 1.0, shape=2)
    log_z = pt.log(z_init)
    pm.LogNormal("y_init", log_z, sigma, observed=y_init)
    pm.LogNormal("y", populations(theta, log_z, len(y)), sigma, observed=y)


def populations(theta: Any, log_z: Any, years: int) -> Any:
    """Solve for (log p, log q) after each year, (years, 2), by fourth-order Runge-Kutta."""
    own = pt.stack([theta[0], -theta[2]]) / STEPS
    other = pt.stack([-theta[1], theta[3]]) / STEPS

    def step(x: Any, own: Any, other: Any) -> Any:
        def change(x: Any) -> Any:
            return own + other * pt.exp(x)[::-1]

        k1 = change(x)
        k2 = change(x + k1 / 2)
        k3 = change(x + k2 / 2)
        k4 = change(x + k3)
        return x + (k1 + k4) / 6 + (k2 + k3) / 3

    path = pytensor.scan(
        step,
        outputs_info=log_z,
        non_sequences=[own, other],
        n_steps=years * STEPS,
        strict=True,
        return_updates=False,
    )
    return path[STEPS - 1 :: STEPS]


def low_dim_gauss_mix(y: np.ndarray) -> None:
    start = np.array([-1.0, 1.0])
    mu = pm.Normal("mu", 0.0, 2.0, shape=2, transform=ordered, initval=start)
    mixture(y, mu)


def low_dim_gauss_mix_collapse(y: np.ndarray) -> None:
    mixture(y, pm.Normal("mu", 0.0, 2.0, shape=2))


def mixture(y: np.ndarray, mu: Any) -> None:
    sigma = pm.HalfNormal("sigma", 2.0, shape=2)
    theta = pm.Beta("theta", 5.0, 5.0)
    pm.NormalMixture("y", pt.stack([theta, 1.0 - theta]), mu, sigma, observed=y)


MODELS: dict[str, Callable[..., Any]] = {
    "garch11": garch11,
    "gp_pois_regr": gp_pois_regr,
    "hmm_drive_1": hmm_drive_1,
    "hmm_example": hmm_example,
    "lotka_volterra": lotka_volterra,
    "low_dim_gauss_mix": low_dim_gauss_mix,
    "low_dim_gauss_mix_collapse": low_dim_gauss_mix_collapse,
}

"""The series, mixtures and processes of models/ for NumPyro, on the data of the Pyro models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

STEPS = 10  # Runge-Kutta steps in a year


def garch11(series: np.ndarray, sigma1: np.ndarray) -> None:
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    alpha0 = numpyro.sample("alpha0", dist.ImproperUniform(constraints.positive, (), ()))
    # Uniform over the triangle; the guides need supports that depend on no latent.
    shares = numpyro.sample("shares", dist.Dirichlet(jnp.ones(3)))
    alpha1 = numpyro.deterministic("alpha1", shares[0])
    beta1 = numpyro.deterministic("beta1", shares[1])
    shock = alpha0 + alpha1 * (series[:-1] - mu) ** 2
    variance = decayed_sum(jnp.concatenate([sigma1[None] ** 2, shock]), beta1)
    numpyro.sample("y", dist.Normal(mu, jnp.sqrt(variance)), obs=series)


def decayed_sum(x: Any, decay: Any) -> Any:
    """Solve h_t = x_t + decay * h_(t-1), (T,) -> (T,), in log2(T) steps."""
    h, lag = x, 1
    while lag < len(x):
        h = jnp.concatenate([h[:lag], h[lag:] + decay * h[:-lag]])
        decay, lag = decay * decay, 2 * lag
    return h


def gp_pois_regr(x: np.ndarray, count: np.ndarray) -> None:
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    distance = (x[:, None] - x) / rho
    covariance = alpha**2 * jnp.exp(-(distance**2) / 2) + 1e-10 * jnp.eye(len(x))
    cholesky = jnp.linalg.cholesky(covariance)
    with numpyro.plate("point", len(x)):
        f_tilde = numpyro.sample("f_tilde", dist.Normal(0.0, 1.0))
    f = numpyro.deterministic("f", cholesky @ f_tilde)
    numpyro.sample("k", dist.Poisson(jnp.exp(f)), obs=count)


def hmm_drive_1(
    u: np.ndarray, v: np.ndarray, tau: np.ndarray, rho: np.ndarray, alpha: np.ndarray
) -> None:
    theta1 = numpyro.sample("theta1", dist.Dirichlet(alpha[0]))
    theta2 = numpyro.sample("theta2", dist.Dirichlet(alpha[1]))
    phi = numpyro.sample("phi", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    lam = numpyro.sample("lambda", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    prior = dist.Normal(jnp.array([0.0, 3.0]), 1.0)
    numpyro.factor("prior", (prior.log_prob(phi) + prior.log_prob(lam)).sum(-1))
    log_u = dist.Normal(phi, tau).log_prob(u[:, None])
    log_v = dist.Normal(lam, rho).log_prob(v[:, None])
    numpyro.factor("u_v", log_marginal(jnp.stack([theta1, theta2]), log_u + log_v))


def hmm_example(y: np.ndarray) -> None:
    theta1 = numpyro.sample("theta1", dist.Dirichlet(jnp.ones(2)))
    theta2 = numpyro.sample("theta2", dist.Dirichlet(jnp.ones(2)))
    support = constraints.positive_ordered_vector
    mu = numpyro.sample("mu", dist.ImproperUniform(support, (), (2,)))
    numpyro.factor("mu_prior", dist.Normal(jnp.array([3.0, 10.0]), 1.0).log_prob(mu).sum(-1))
    log_emission = dist.Normal(mu, 1.0).log_prob(y[:, None])
    numpyro.factor("y", log_marginal(jnp.stack([theta1, theta2]), log_emission))


def log_marginal(transition: Any, log_emission: Any) -> Any:
    """Sum over all paths, for (K, K) and (T, K), by products of neighbours in log2(T) steps."""
    log_m = jnp.log(transition) + log_emission[1:, None, :]
    while len(log_m) > 1:
        left, right = log_m[0:-1:2], log_m[1::2]
        pairs = jax.nn.logsumexp(left[:, :, :, None] + right[:, None, :, :], axis=-2)
        log_m = jnp.concatenate([pairs, log_m[2 * len(pairs) :]])  # an odd one out waits
    return jax.nn.logsumexp(log_emission[0, :, None] + log_m[0])


def lotka_volterra(y_init: np.ndarray, y: np.ndarray) -> None:
    middle, spread = np.array([[1.0, 0.05, 1.0, 0.05], [0.5, 0.05, 0.5, 0.05]])
    with numpyro.plate("rate", 4):
        theta = numpyro.sample("theta", dist.TruncatedNormal(middle, spread, low=0.0))
    with numpyro.plate("species", 2):
        z_init = numpyro.sample("z_init", dist.LogNormal(math.log(10.0), 1.0))
        sigma = numpyro.sample("sigma", dist.LogNormal(-1.0, 1.0))
    log_z = jnp.log(z_init)
    numpyro.sample("y_init", dist.LogNormal(log_z, sigma), obs=y_init)
    numpyro.sample("y", dist.LogNormal(populations(theta, log_z, len(y)), sigma), obs=y)


def populations(theta: Any, log_z: Any, years: int) -> Any:
    """Solve for (log p, log q) after each year, (years, 2), by fourth-order Runge-Kutta."""
    own = jnp.stack([theta[0], -theta[2]]) / STEPS
    other = jnp.stack([-theta[1], theta[3]]) / STEPS

    def change(x: Any) -> Any:
        return own + other * jnp.exp(x)[::-1]

    def step(x: Any, _: None) -> Any:
        k1 = change(x)
        k2 = change(x + k1 / 2)
        k3 = change(x + k2 / 2)
        k4 = change(x + k3)
        x = x + (k1 + k4) / 6 + (k2 + k3) / 3
        return x, x

    _, path = jax.lax.scan(step, log_z, None, length=years * STEPS)
    return path[STEPS - 1 :: STEPS]


def low_dim_gauss_mix(y: np.ndarray) -> None:
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    numpyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum(-1))
    with numpyro.plate("component", 2):
        sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    mixture(y, mu, sigma)


def low_dim_gauss_mix_collapse(y: np.ndarray) -> None:
    with numpyro.plate("component", 2):
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        sigma = numpyro.sample("sigma", dist.HalfNormal(2.0))
    mixture(y, mu, sigma)


def mixture(y: np.ndarray, mu: Any, sigma: Any) -> None:
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    weight = dist.Categorical(probs=jnp.stack([theta, 1.0 - theta]))
    numpyro.sample("y", dist.MixtureSameFamily(weight, dist.Normal(mu, sigma)), obs=y)


MODELS: dict[str, Callable[..., Any]] = {
    "garch11": garch11,
    "gp_pois_regr": gp_pois_regr,
    "hmm_drive_1": hmm_drive_1,
    "hmm_example": hmm_example,
    "lotka_volterra": lotka_volterra,
    "low_dim_gauss_mix": low_dim_gauss_mix,
    "low_dim_gauss_mix_collapse": low_dim_gauss_mix_collapse,
}

"""Four models on made-up data, for Pyro, NumPyro and PyMC, and by hand for torch and JAX.

Each is a density of z in R^D: scales are the exponentials of their coordinates. By hand,
`score` returns log p and its gradient for (K, D) points, the gradient written out. Data are of
the precision asked for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

HIDDEN = (20, 18)
INPUTS = 4
NOISE = 0.3
LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Problem:
    """A model in five ways.

    Attributes:
        dim: Length D of z.
        model: For Pyro; right with vectorised particles too.
        args: What it is called with.
        score: By hand in torch: (K, D) -> log p (K) and its gradient (K, D).
        numpyro: Makes the model for NumPyro.
        jax: Makes log p for JAX: (K, D) -> (K).
        pymc: Adds the variables to the PyMC model in whose context it is called.
    """

    dim: int
    model: Callable[..., Any]
    args: tuple[Tensor, ...]
    score: Callable[[Tensor], tuple[Tensor, Tensor]]
    numpyro: Callable[[], Callable[..., Any]]
    jax: Callable[[], Callable[[Any], Any]]
    pymc: Callable[[], None]

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the data."""
        return self.args[0].dtype


def eight_schools(dtype: torch.dtype = torch.float64) -> Problem:
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=dtype)
    s = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=dtype)

    def model(y: Tensor, s: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", 8):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * theta, s), obs=y)

    def score(z: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_tau, theta = z[:, :1], z[:, 1:2], z[:, 2:]
        tau = log_tau.exp()
        off = (y - mu - tau * theta) / s
        ratio = (tau / 5).square()
        log_p = (
            -0.5 * (off.square().sum(1) + theta.square().sum(1))
            + (-0.5 * (mu / 5).square() + log_tau - torch.log1p(ratio)).squeeze(1)
            - 8 * LOG_2PI
            - s.log().sum()
            - 0.5 * LOG_2PI
            - math.log(5)
            + math.log(2 / (5 * math.pi))
        )
        pull = off / s
        g_mu = pull.sum(1, keepdim=True) - mu / 25
        g_tau = tau * (pull * theta).sum(1, keepdim=True) + 1 - 2 * ratio / (1 + ratio)
        return log_p, torch.cat([g_mu, g_tau, tau * pull - theta], 1)

    def for_numpyro() -> Callable[..., Any]:
        import numpyro
        import numpyro.distributions as nd

        def model(y: Any, s: Any) -> None:
            mu = numpyro.sample("mu", nd.Normal(0.0, 5.0))
            tau = numpyro.sample("tau", nd.HalfCauchy(5.0))
            with numpyro.plate("school", 8):
                theta = numpyro.sample("theta", nd.Normal(0.0, 1.0))
                numpyro.sample("y", nd.Normal(mu + tau * theta, s), obs=y)

        return model

    def for_jax() -> Callable[[Any], Any]:
        import jax.numpy as jnp

        yy, ss = jnp.asarray(y.numpy()), jnp.asarray(s.numpy())

        def log_p(z: Any) -> Any:
            mu, log_tau, theta = z[:, :1], z[:, 1:2], z[:, 2:]
            tau = jnp.exp(log_tau)
            off = (yy - mu - tau * theta) / ss
            prior = -0.5 * (mu / 5) ** 2 + log_tau - jnp.log1p((tau / 5) ** 2)
            constant = -8.5 * LOG_2PI - jnp.log(ss).sum() - math.log(5)
            constant = constant + math.log(2 / (5 * math.pi))
            return -0.5 * ((off**2).sum(1) + (theta**2).sum(1)) + prior[:, 0] + constant

        return log_p

    def for_pymc() -> None:
        import pymc as pm

        mu, tau = pm.Normal("mu", 0.0, 5.0), pm.HalfCauchy("tau", 5.0)
        theta = pm.Normal("theta", 0.0, 1.0, shape=8)
        pm.Normal("y", mu + tau * theta, s.numpy(), observed=y.numpy())

    return Problem(10, model, (y, s), score, for_numpyro, for_jax, for_pymc)


def radon(dtype: torch.dtype = torch.float64) -> Problem:
    rng = np.random.default_rng(0)
    groups = torch.tensor(rng.integers(0, 85, 919))
    x = torch.tensor(rng.integers(0, 2, 919).astype(float))
    y = torch.tensor(1.3 + 0.3 * rng.normal(size=85)[groups] - 0.7 * x.numpy())
    y = y + 0.7 * torch.tensor(rng.normal(size=919))
    x, y = x.to(dtype), y.to(dtype)

    def model(x: Tensor, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        beta = pyro.sample("beta", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("group", 85):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 919):
            mean = mu + tau * a[..., groups] + beta * x
            pyro.sample("y", dist.Normal(mean, sigma), obs=y)

    def score(z: Tensor) -> tuple[Tensor, Tensor]:
        mu, beta, log_tau, log_sigma, a = z.split([1, 1, 1, 1, 85], 1)
        tau, sigma = log_tau.exp(), log_sigma.exp()
        own = a[:, groups]
        off = (y - mu - tau * own - beta * x) / sigma
        log_p = (
            -0.5 * (off.square().sum(1) + a.square().sum(1))
            - 0.5 * ((mu.square() + beta.square()) / 25 + tau.square() + sigma.square()).squeeze(1)
            + (log_tau + log_sigma - 919 * log_sigma).squeeze(1)
            - (919 + 85 + 4) / 2 * LOG_2PI
            - 2 * math.log(5)
            + 2 * math.log(2)
        )
        pull = off / sigma
        g_a = torch.zeros_like(a).index_add_(1, groups, pull) * tau - a
        g_tau = tau * (pull * own).sum(1, keepdim=True) + 1 - tau.square()
        g_sigma = off.square().sum(1, keepdim=True) - 918 - sigma.square()
        g_mu = pull.sum(1, keepdim=True) - mu / 25
        g_beta = (pull @ x)[:, None] - beta / 25
        return log_p, torch.cat([g_mu, g_beta, g_tau, g_sigma, g_a], 1)

    def for_numpyro() -> Callable[..., Any]:
        import numpyro
        import numpyro.distributions as nd

        index = groups.numpy()

        def model(x: Any, y: Any) -> None:
            mu = numpyro.sample("mu", nd.Normal(0.0, 5.0))
            beta = numpyro.sample("beta", nd.Normal(0.0, 5.0))
            tau = numpyro.sample("tau", nd.HalfNormal(1.0))
            sigma = numpyro.sample("sigma", nd.HalfNormal(1.0))
            with numpyro.plate("group", 85):
                a = numpyro.sample("a", nd.Normal(0.0, 1.0))
            with numpyro.plate("row", 919):
                mean = mu + tau * a[index] + beta * x
                numpyro.sample("y", nd.Normal(mean, sigma), obs=y)

        return model

    def for_jax() -> Callable[[Any], Any]:
        import jax.numpy as jnp

        xx, yy, index = jnp.asarray(x.numpy()), jnp.asarray(y.numpy()), groups.numpy()

        def log_p(z: Any) -> Any:
            mu, beta, log_tau, log_sigma, a = jnp.split(z, [1, 2, 3, 4], axis=1)
            tau, sigma = jnp.exp(log_tau), jnp.exp(log_sigma)
            off = (yy - mu - tau * a[:, index] - beta * xx) / sigma
            prior = -0.5 * ((mu**2 + beta**2) / 25 + tau**2 + sigma**2) + log_tau - 918 * log_sigma
            constant = -(919 + 85 + 4) / 2 * LOG_2PI - 2 * math.log(5) + 2 * math.log(2)
            return -0.5 * ((off**2).sum(1) + (a**2).sum(1)) + prior[:, 0] + constant

        return log_p

    def for_pymc() -> None:
        import pymc as pm

        mu, beta = pm.Normal("mu", 0.0, 5.0), pm.Normal("beta", 0.0, 5.0)
        tau, sigma = pm.HalfNormal("tau", 1.0), pm.HalfNormal("sigma", 1.0)
        a = pm.Normal("a", 0.0, 1.0, shape=85)
        mean = mu + tau * a[groups.numpy()] + beta * x.numpy()
        pm.Normal("y", mean, sigma, observed=y.numpy())

    return Problem(89, model, (x, y), score, for_numpyro, for_jax, for_pymc)


def logistic(dtype: torch.dtype = torch.float64) -> Problem:
    rng = np.random.default_rng(1)
    x = torch.tensor(rng.normal(size=(1000, 25))).to(dtype)
    y = (torch.rand(1000, generator=torch.Generator().manual_seed(0)) < torch.sigmoid(x[:, 0])).to(
        dtype
    )

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(25, dtype=x.dtype), 1.0).to_event(1))
        logits = _rows(torch.einsum("...j,nj->...n", w, x))
        with pyro.plate("row", 1000):
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    def score(w: Tensor) -> tuple[Tensor, Tensor]:
        logits = w @ x.mT
        log_p = logits @ y - torch.nn.functional.softplus(logits).sum(1)
        log_p = log_p - 0.5 * w.square().sum(1) - 12.5 * LOG_2PI
        return log_p, (y - torch.sigmoid(logits)) @ x - w

    def for_numpyro() -> Callable[..., Any]:
        import numpyro
        import numpyro.distributions as nd

        def model(x: Any, y: Any) -> None:
            w = numpyro.sample("w", nd.Normal(np.zeros(25), 1.0).to_event(1))
            with numpyro.plate("row", 1000):
                numpyro.sample("y", nd.Bernoulli(logits=x @ w), obs=y)

        return model

    def for_jax() -> Callable[[Any], Any]:
        import jax
        import jax.numpy as jnp

        xx, yy = jnp.asarray(x.numpy()), jnp.asarray(y.numpy())

        def log_p(w: Any) -> Any:
            logits = w @ xx.T
            fit = logits @ yy - jax.nn.softplus(logits).sum(1)
            return fit - 0.5 * (w**2).sum(1) - 12.5 * LOG_2PI

        return log_p

    def for_pymc() -> None:
        import pymc as pm

        w = pm.Normal("w", 0.0, 1.0, shape=25)
        pm.Bernoulli("y", logit_p=x.numpy() @ w, observed=y.numpy())

    return Problem(25, model, (x, y), score, for_numpyro, for_jax, for_pymc)


def network(dtype: torch.dtype = torch.float64) -> Problem:
    """A regression by 497 weights: 4 inputs, 20 and 18 hidden units, 100 rows."""
    rng = np.random.default_rng(2)
    first, second = HIDDEN
    x = torch.tensor(rng.normal(size=(100, INPUTS)))
    y = x[:, 0].sin() + 0.5 * x[:, 1] * x[:, 2] + NOISE * torch.tensor(rng.normal(size=100))
    x, y = x.to(dtype), y.to(dtype)
    sizes = [INPUTS * first, first, first * second, second, second, 1]
    dim = sum(sizes)
    constant = -0.5 * dim * LOG_2PI - 50 * LOG_2PI - 100 * math.log(NOISE)

    def parts(w: Any, split: Callable[[Any], list[Any]]) -> list[Any]:
        a, b, c, d, e, f = split(w)
        lead = w.shape[:-1]
        return [a.reshape(*lead, INPUTS, first), b, c.reshape(*lead, first, second), d, e, f]

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(dim, dtype=x.dtype), 1.0).to_event(1))
        a, b, c, d, e, f = parts(w, lambda w: list(w.split(sizes, -1)))
        h = (x @ a + b.unsqueeze(-2)).tanh()
        h = (h @ c + d.unsqueeze(-2)).tanh()
        mean = _rows((h @ e.unsqueeze(-1)).squeeze(-1) + f)
        with pyro.plate("row", 100):
            pyro.sample("y", dist.Normal(mean, NOISE), obs=y)

    def score(w: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c, d, e, f = parts(w, lambda w: list(w.split(sizes, -1)))
        h1 = (x @ a + b[:, None]).tanh()
        h2 = torch.baddbmm(d[:, None], h1, c).tanh()
        off = (y - torch.bmm(h2, e[:, :, None]).squeeze(-1) - f) / NOISE
        log_p = -0.5 * (off.square().sum(1) + w.square().sum(1)) + constant
        pull = off / NOISE
        p2 = (pull[:, :, None] * e[:, None]) * (1 - h2.square())
        p1 = torch.bmm(p2, c.mT) * (1 - h1.square())
        gradient = [
            (x.mT @ p1).flatten(1),
            p1.sum(1),
            torch.bmm(h1.mT, p2).flatten(1),
            p2.sum(1),
            torch.bmm(pull[:, None], h2).squeeze(1),
            pull.sum(1, keepdim=True),
        ]
        return log_p, torch.cat(gradient, 1) - w

    def for_numpyro() -> Callable[..., Any]:
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as nd

        ends = list(np.cumsum(sizes)[:-1])

        def model(x: Any, y: Any) -> None:
            w = numpyro.sample("w", nd.Normal(np.zeros(dim), 1.0).to_event(1))
            a, b, c, d, e, f = parts(w, lambda w: jnp.split(w, ends, -1))
            mean = jnp.tanh(jnp.tanh(x @ a + b) @ c + d) @ e + f
            with numpyro.plate("row", 100):
                numpyro.sample("y", nd.Normal(mean, NOISE), obs=y)

        return model

    def for_jax() -> Callable[[Any], Any]:
        import jax.numpy as jnp

        ends = list(np.cumsum(sizes)[:-1])
        xx, yy = jnp.asarray(x.numpy()), jnp.asarray(y.numpy())

        def log_p(w: Any) -> Any:
            a, b, c, d, e, f = parts(w, lambda w: jnp.split(w, ends, -1))
            h = jnp.tanh(jnp.tanh(xx @ a + b[:, None]) @ c + d[:, None])
            off = (yy - (h @ e[:, :, None])[..., 0] - f) / NOISE
            return -0.5 * ((off**2).sum(1) + (w**2).sum(1)) + constant

        return log_p

    def for_pymc() -> None:
        import pymc as pm

        w = pm.Normal("w", 0.0, 1.0, shape=dim)
        ends = itertools.pairwise([0, *np.cumsum(sizes)])
        a, b, c, d, e, f = (w[i:j] for i, j in ends)
        h = pm.math.tanh(x.numpy() @ a.reshape((INPUTS, first)) + b)
        h = pm.math.tanh(h @ c.reshape((first, second)) + d)
        pm.Normal("y", h @ e + f, NOISE, observed=y.numpy())

    return Problem(dim, model, (x, y), score, for_numpyro, for_jax, for_pymc)


def _rows(values: Tensor) -> Tensor:
    """Values (..., 1, N) of vectorised particles, whose plate of rows is the last: (..., N)."""
    return values.squeeze(-2) if values.dim() > 1 else values


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "eight_schools": eight_schools,
    "radon": radon,
    "logistic": logistic,
    "network": network,
}

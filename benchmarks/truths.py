"""Log evidence, posterior means and sds of the models of many latents, by quadrature.

The few shared latents are integrated by the trapezoidal rule on a grid around their mode, in
coordinates in which their posterior is nearly a standard normal; all else is integrated for each
point of the grid: exactly where it is normal (`Mixed`, `local_level`) or conjugate
(`beta_binomial`), by adaptive Gauss-Hermite quadrature for each group otherwise. A function has the
name of its model's file and takes the model's arguments.

The rule is right to 1e-13 for a normal density with steps of 0.8 sds. Log scales of few groups are
far from normal: the half-normal prior of a scale is analytic in a strip of width π/4 around its
logarithm, which steps of 0.25 resolve to 1e-8.

Trefethen and Weideman (2014), "The exponentially convergent trapezoidal rule"; Liu and Pierce
(1994), "A note on Gauss-Hermite quadrature"; Durbin and Koopman (2012), "Time Series Analysis by
State Space Methods".
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import betaln, expit, gammaln, log_expit, logsumexp, roots_hermite

Array = np.ndarray
# Mean and variance of latents given each point of a grid, (P, *shape) each.
Moments = dict[str, tuple[Array, Array]]
LOG_2PI = float(np.log(2 * np.pi))
TABLE = 2_000_000  # numbers of a table of points and groups


@dataclass(frozen=True)
class Truth:
    """Log evidence, and posterior mean and sd of latents in constrained space, by name."""

    log_evidence: float
    mean: dict[str, Array]
    sd: dict[str, Array]


@dataclass(frozen=True)
class Problem:
    """A posterior of shared latents, and the moments of all latents given them.

    Args:
        dim: Number of shared latents.
        log_density: Of them and of the data, all else integrated; (P, dim) -> (P,).
        given: Mean and variance of each latent given them.
        groups: Number of groups, by which points are taken in pieces.
        step: Of the grid, in sds; at most `widest` in the coordinates themselves.
        drop: The grid ends where the log density is lower than at the mode by this.
    """

    dim: int
    log_density: Callable[[Array], Array]
    given: Callable[[Array], Moments]
    groups: int
    step: float = 0.8
    drop: float = 25.0
    widest: float = 0.25

    def pieces(self, points: Array) -> Iterator[Array]:
        """Indices of points that are taken at once."""
        size = max(1, TABLE // self.groups)
        return (np.arange(i, min(i + size, len(points))) for i in range(0, len(points), size))

    def log_densities(self, points: Array) -> Array:
        return np.concatenate([self.log_density(points[piece]) for piece in self.pieces(points)])

    def solve(self) -> Truth:
        """Integrate."""
        points, log_mass = grid(self)
        log_evidence = float(logsumexp(log_mass))
        weight = np.exp(log_mass - log_evidence)
        points, weight = points[weight > 1e-15], weight[weight > 1e-15]
        mean, second = dict[str, Array](), dict[str, Array]()
        for piece in self.pieces(points):
            for name, (m, v) in self.given(points[piece]).items():
                mean[name] = mean.get(name, 0.0) + np.tensordot(weight[piece], m, 1)
                second[name] = second.get(name, 0.0) + np.tensordot(weight[piece], v + m**2, 1)
        sd = {name: np.sqrt(np.maximum(second[name] - mean[name] ** 2, 0.0)) for name in mean}
        return Truth(log_evidence, mean, sd)


def grid(problem: Problem) -> tuple[Array, Array]:
    """Points around the mode, (P, dim), and the log mass of each, (P,)."""
    mode, precision = find_mode(problem)
    factor = problem.step * np.linalg.cholesky(np.linalg.inv(precision))
    factor *= np.minimum(1.0, problem.widest / np.abs(factor).max(0))
    peak = problem.log_densities(mode[None])[0]
    ends = np.zeros((problem.dim, 2), int)
    for axis, side in itertools.product(range(problem.dim), (0, 1)):
        walk = np.arange(1, 200) * (2 * side - 1)
        along = problem.log_densities(mode + walk[:, None] * factor[:, axis])
        low = along < peak - problem.drop
        if not low.any():
            raise ValueError(f"The density of shared latent {axis} does not fall off: no grid.")
        ends[axis, side] = (2 * side - 1) * (int(low.argmax()) + 1)
    while True:
        axes = [np.arange(first, last + 1) for first, last in ends]
        table = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
        points = mode + table.reshape(-1, problem.dim) @ factor.T
        log_p = problem.log_densities(points)
        shape, highest = table.shape[:-1], log_p.max()
        wide = True
        for axis, side in itertools.product(range(problem.dim), (0, 1)):
            face = log_p.reshape(shape).take(-side, axis)
            if face.max() > highest - 0.7 * problem.drop:
                ends[axis, side] += 2 * (2 * side - 1)
                wide = False
        if wide:
            return points, log_p + np.log(np.diag(factor)).sum()


def find_mode(problem: Problem, rounds: int = 100) -> tuple[Array, Array]:
    """Mode of the shared latents, from zero, and the negative Hessian there.

    Newton's method with differences for derivatives: all points of a round are one batch.
    """
    dim, h = problem.dim, 1e-3
    unit = np.eye(dim)
    pairs = list(itertools.combinations(range(dim), 2))
    corners = [a * unit[i] + b * unit[j] for i, j in pairs for a in (1, -1) for b in (1, -1)]
    stencil = h * np.array([np.zeros(dim), *unit, *-unit, *corners])
    x = np.zeros(dim)
    for _ in range(rounds):
        f = problem.log_densities(x + stencil)
        up, down = f[1 : dim + 1], f[dim + 1 : 2 * dim + 1]
        gradient = (up - down) / (2 * h)
        precision = np.diag((2 * f[0] - up - down) / h**2)
        for (i, j), c in zip(pairs, f[2 * dim + 1 :].reshape(-1, 4), strict=True):
            precision[i, j] = precision[j, i] = -(c[0] - c[1] - c[2] + c[3]) / (4 * h**2)
        values, vectors = np.linalg.eigh(precision)
        newton = vectors @ (vectors.T @ gradient / np.maximum(np.abs(values), 1e-3))
        newton *= min(1.0, 2.0 / np.abs(newton).max()) if np.abs(newton).max() > 0 else 1.0
        if np.sqrt(abs(gradient @ newton)) < 1e-3 and values.min() > 0:
            return x, precision
        trials = x + 0.5 ** np.arange(12)[:, None] * newton
        x = trials[int(problem.log_densities(trials).argmax())]
    raise ValueError("The shared latents have no mode that Newton's method finds.")


def half_normal(log_x: Array, scale: float) -> Array:
    """Log density of log x for x half normal, up to the Jacobian that it includes."""
    return 0.5 * np.log(2 / np.pi) - np.log(scale) - 0.5 * np.exp(2 * log_x) / scale**2 + log_x


def normal(x: Array, sd: float) -> Array:
    return -0.5 * (x / sd) ** 2 - np.log(sd) - 0.5 * LOG_2PI


def known(value: Array) -> tuple[Array, Array]:
    """Moments of a function of the shared latents."""
    return value, np.zeros_like(value)


# All is normal given the scales.


@dataclass(frozen=True)
class Mixed:
    """Rows y = x u[group] + s e with u[group] ~ N(a[group] beta, covariance), beta ~ N(0, prior²).

    Sums over the rows of each group are all that is needed of the data.
    """

    n: Array  # (G,)
    xx: Array  # (G, d, d)
    xy: Array  # (G, d)
    yy: Array  # (G,)
    a: Array  # (G, d, b)
    prior: float

    @classmethod
    def of(cls, group: Array, x: Array, y: Array, a: Array, prior: float) -> Mixed:
        """Sum over rows: group (N,), x (N, d), y (N,)."""
        groups = len(a)

        def total(v: Array) -> Array:
            flat = v.reshape(len(v), -1).T
            sums = [np.bincount(group, column, groups) for column in flat]
            return np.stack(sums, -1).reshape(groups, *v.shape[1:])

        outer = x[:, :, None] * x[:, None]
        ones = np.ones(len(y))
        return cls(total(ones), total(outer), total(x * y[:, None]), total(y**2), a, prior)

    def given(self, covariance: Array, s: Array) -> tuple[Array, ...]:
        """Log density of the data, (P,), and moments of beta, (P, b), and of u, (P, G, d).

        Args:
            covariance: Of u, (P, d, d).
            s: Of the noise, (P,).
        """
        v = s[:, None] ** 2
        inner, log_prior = inverse(covariance)
        m, log_m = inverse(inner[:, None] + self.xx / v[..., None, None])  # (P, G, d, d)
        log_m, log_prior = -log_m, log_prior[:, None]
        xm = self.xx @ m / v[..., None, None]
        k = (self.xx - xm @ self.xx) / v[..., None, None]
        r = (self.xy - (xm @ self.xy[..., None])[..., 0]) / v[..., None]
        fit = np.einsum("gi,pgij,gj->pg", self.xy, m, self.xy) / v**2
        at = np.swapaxes(self.a, -1, -2)
        b = self.a.shape[-1]
        precision = (at @ k @ self.a).sum(1) + np.eye(b) / self.prior**2
        h = (at @ r[..., None])[..., 0].sum(1)
        log_v = self.n * np.log(v) + log_prior - log_m
        spread = np.linalg.inv(precision)
        beta = np.einsum("pij,pj->pi", spread, h)
        log_p = -0.5 * (
            self.n.sum() * LOG_2PI
            + (log_v + self.yy / v - fit).sum(1)
            - (h * beta).sum(-1)
            + np.linalg.slogdet(precision)[1]
            + 2 * b * np.log(self.prior)
        )
        pull = m @ inner[:, None] @ self.a  # (P, G, d, b)
        u = np.einsum("pgij,pgj->pgi", m, self.xy / v[..., None])
        u = u + np.einsum("pgib,pb->pgi", pull, beta)
        uu = np.einsum("pgii->pgi", m) + np.einsum("pgib,pbc,pgic->pgi", pull, spread, pull)
        return log_p, beta, np.einsum("pii->pi", spread), u, uu


def inverse(m: Array) -> tuple[Array, Array]:
    """Of symmetric matrices, (..., d, d), and the log determinants of the matrices."""
    d = m.shape[-1]
    if d > 2:
        return np.linalg.inv(m), np.linalg.slogdet(m)[1]
    if d == 1:
        return 1 / m, np.log(m[..., 0, 0])
    determinant = m[..., 0, 0] * m[..., 1, 1] - m[..., 0, 1] ** 2
    adjoint = np.empty_like(m)
    adjoint[..., 0, 0], adjoint[..., 1, 1] = m[..., 1, 1], m[..., 0, 0]
    adjoint[..., 0, 1] = adjoint[..., 1, 0] = -m[..., 0, 1]
    return adjoint / determinant[..., None, None], np.log(determinant)


def normal_groups(y: Array) -> Problem:
    """Scales are log tau and log s."""
    groups, rows = y.shape
    group = np.repeat(np.arange(groups), rows)
    data = Mixed.of(group, np.ones((y.size, 1)), y.ravel(), np.ones((groups, 1, 1)), 5.0)

    def parts(x: Array) -> tuple[Array, ...]:
        return data.given(np.exp(2 * x[:, 0])[:, None, None], np.exp(x[:, 1]))

    def log_density(x: Array) -> Array:
        return parts(x)[0] + half_normal(x, 2.0).sum(-1)

    def given(x: Array) -> Moments:
        _, mu, mu_v, u, u_v = parts(x)
        scales = {name: known(np.exp(x[:, i])) for i, name in enumerate(("tau", "s"))}
        return {**scales, "mu": (mu[:, 0], mu_v[:, 0]), "u": (u[..., 0], u_v[..., 0])}

    return Problem(2, log_density, given, groups)


def radon_slopes(uranium: Array, county: Array, floor: Array, level: Array) -> Problem:
    """Scales are the logarithms of tau_a, tau_b and sigma."""
    groups = len(uranium)
    a = np.zeros((groups, 2, 3))
    a[:, 0, 0], a[:, 0, 1], a[:, 1, 2] = 1.0, uranium, 1.0
    data = Mixed.of(county, np.stack([np.ones_like(floor), floor], -1), level, a, 5.0)

    def parts(x: Array) -> tuple[Array, ...]:
        return data.given(np.exp(2 * x[:, :2])[..., None] * np.eye(2), np.exp(x[:, 2]))

    def log_density(x: Array) -> Array:
        return parts(x)[0] + half_normal(x, 1.0).sum(-1)

    def given(x: Array) -> Moments:
        _, beta, beta_v, u, u_v = parts(x)
        found = {n: known(np.exp(x[:, i])) for i, n in enumerate(("tau_a", "tau_b", "sigma"))}
        found |= {n: (beta[:, i], beta_v[:, i]) for i, n in enumerate(("mu_a", "gamma", "mu_b"))}
        return found | {n: (u[..., i], u_v[..., i]) for i, n in enumerate(("intercept", "slope"))}

    return Problem(3, log_density, given, groups)


def random_slopes(group: Array, x: Array, y: Array) -> Problem:
    """Two slopes: log scales, the inverse hyperbolic tangent of the correlation, and log s."""
    if x.shape[1] != 2:
        raise ValueError(f"Quadrature is of two slopes; got {x.shape[1]}.")
    groups = int(group.max()) + 1
    data = Mixed.of(group, x, y, np.broadcast_to(np.eye(2), (groups, 2, 2)), 5.0)

    def parts(z: Array) -> tuple[Array, ...]:
        tau, rho = np.exp(z[:, :2]), np.clip(np.tanh(z[:, 2]), -1 + 1e-14, 1 - 1e-14)
        covariance = tau[:, :, None] * tau[:, None]
        covariance[:, 0, 1] *= rho
        covariance[:, 1, 0] *= rho
        return data.given(covariance, np.exp(z[:, 3]))

    def log_density(z: Array) -> Array:
        # p(rho) is (1 - rho²) 3 / 4 where the concentration is 2, and so is the Jacobian.
        square = 2 * (np.log(2.0) - np.logaddexp(z[:, 2], -z[:, 2]))
        scales = half_normal(z[:, [0, 1, 3]], 2.0).sum(-1)
        return parts(z)[0] + scales + np.log(0.75) + 2 * square

    def given(z: Array) -> Moments:
        _, beta, beta_v, u, u_v = parts(z)
        rho = np.tanh(z[:, 2])
        factor = np.zeros((len(z), 2, 2))
        factor[:, 0, 0], factor[:, 1, 0], factor[:, 1, 1] = 1.0, rho, np.sqrt(1 - rho**2)
        scales = {"tau": known(np.exp(z[:, :2])), "s": known(np.exp(z[:, 3]))}
        return {**scales, "factor": known(factor), "beta": (beta, beta_v), "u": (u, u_v)}

    return Problem(4, log_density, given, groups, step=1.0, drop=20.0)


# A normal intercept for each group, in an exponential family.


def intercepts(
    total: Array,
    size: Array,
    cumulant: Callable[[Array], Array],
    slope: Callable[[Array], Array],
    curvature: Callable[[Array], Array],
    constant: float,
    nodes: int = 40,
) -> Problem:
    """Log likelihood of a group: total u - size A(u), with u ~ N(mu, tau).

    Shared latents are mu and log tau. Groups with the same data are integrated once.

    Args:
        total: Of each group, (G,).
        size: Of each group, (G,).
        cumulant: A.
        slope: Derivative of A.
        curvature: Second derivative of A.
        constant: Added to the log likelihood.
        nodes: Of the quadrature over u.
    """
    both, back, count = np.unique(
        np.stack([total, size], -1), axis=0, return_inverse=True, return_counts=True
    )
    t, n = both.T
    x, w = roots_hermite(nodes)

    def inner(z: Array) -> tuple[Array, Array, Array]:
        mu, tau = z[:, :1], np.exp(z[:, 1:])
        u = np.broadcast_to(mu, (len(z), len(t))).copy()
        for _ in range(200):
            force = t - n * slope(u) - (u - mu) / tau**2
            step = force / (n * curvature(u) + 1 / tau**2)
            u += np.clip(step, -1.0, 1.0)
            if np.abs(step).max() < 1e-6:
                break
        sd = 1 / np.sqrt(n * curvature(u) + 1 / tau**2)
        log_mass, at = np.empty((nodes, *u.shape)), np.empty((nodes, *u.shape))
        for i in range(nodes):
            at[i] = v = u + np.sqrt(2.0) * sd * x[i]
            with np.errstate(over="ignore"):  # a likelihood of zero
                log_p = t * v - n * cumulant(v) - 0.5 * ((v - mu) / tau) ** 2 - np.log(tau)
            log_mass[i] = log_p - 0.5 * LOG_2PI + np.log(np.sqrt(2.0) * sd * w[i]) + x[i] ** 2
        log_z = logsumexp(log_mass, axis=0)
        share = np.exp(log_mass - log_z)
        mean = (share * at).sum(0)
        return log_z, mean, (share * (at - mean) ** 2).sum(0)

    def log_density(z: Array) -> Array:
        prior = normal(z[:, 0], 2.0) + half_normal(z[:, 1], 1.0)
        return inner(z)[0] @ count + prior + constant

    def given(z: Array) -> Moments:
        _, mean, variance = inner(z)
        u = mean[:, back], variance[:, back]
        return {"mu": known(z[:, 0]), "tau": known(np.exp(z[:, 1])), "u": u}

    return Problem(2, log_density, given, nodes * len(t))


def logistic_groups(group: Array, outcome: Array) -> Problem:
    def curvature(u: Array) -> Array:
        return expit(u) * expit(-u)

    total, size = np.bincount(group, outcome), np.bincount(group).astype(float)
    return intercepts(total, size, lambda u: -log_expit(-u), expit, curvature, 0.0)


def poisson_groups(exposure: Array, count: Array) -> Problem:
    constant = float((count * np.log(exposure) - gammaln(count + 1)).sum())
    return intercepts(count.sum(1), exposure.sum(1), np.exp, np.exp, np.exp, constant)


def beta_binomial(trials: Array, successes: Array) -> Problem:
    """Shared latents are the logit of the mean and the logarithm of the size."""
    failures = trials - successes
    constant = (gammaln(trials + 1) - gammaln(successes + 1) - gammaln(failures + 1)).sum()

    def shapes(x: Array) -> tuple[Array, Array]:
        size = np.exp(x[:, 1:])
        return expit(x[:, :1]) * size, expit(-x[:, :1]) * size

    def log_density(x: Array) -> Array:
        a, b = shapes(x)
        rows = (betaln(a + successes, b + failures) - betaln(a, b)).sum(1)
        # Beta(2, 2), and the Jacobian of a logit.
        prior = np.log(6.0) + 2 * (log_expit(x[:, 0]) + log_expit(-x[:, 0]))
        return rows + constant + prior + normal(x[:, 1] - 2.0, 1.0)

    def given(x: Array) -> Moments:
        a, b = shapes(x)
        a, b = a + successes, b + failures
        p = a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))
        return {"mean": known(expit(x[:, 0])), "size": known(np.exp(x[:, 1])), "p": p}

    return Problem(2, log_density, given, len(trials))


# A series that is normal given the scales.


def local_level(y: Array) -> Problem:
    """Scales are log step and log noise; a Kalman filter and smoother for each of their values."""

    def filtered(x: Array) -> tuple[Array, Array, Array]:
        step, noise = np.exp(2 * x).T
        log_p, m, v = np.zeros(len(x)), np.zeros(len(x)), np.full(len(x), 25.0)
        means, variances = np.empty((2, len(y), len(x)))
        for t, now in enumerate(y):
            if t:
                v = v + step
            whole = v + noise
            log_p -= 0.5 * (LOG_2PI + np.log(whole) + (now - m) ** 2 / whole)
            m, v = m + v / whole * (now - m), v * noise / whole
            means[t], variances[t] = m, v
        return log_p, means, variances

    def log_density(x: Array) -> Array:
        return filtered(x)[0] + half_normal(x[:, 0], 1.0) + half_normal(x[:, 1], 2.0)

    def given(x: Array) -> Moments:
        _, m, v = filtered(x)
        for t in range(len(y) - 2, -1, -1):
            ahead = v[t] + np.exp(2 * x[:, 0])
            gain = v[t] / ahead
            m[t] += gain * (m[t + 1] - m[t])
            v[t] += gain**2 * (v[t + 1] - ahead)
        scales = {"step": known(np.exp(x[:, 0])), "noise": known(np.exp(x[:, 1]))}
        return {**scales, "level": (m.T, v.T)}

    return Problem(2, log_density, given, len(y))


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "normal_groups": normal_groups,
    "normal_groups_noncentered": normal_groups,
    "radon_slopes": radon_slopes,
    "random_slopes": random_slopes,
    "logistic_groups": logistic_groups,
    "poisson_groups": poisson_groups,
    "beta_binomial": beta_binomial,
    "local_level": local_level,
}


def truth(name: str, *arguments: Array) -> Truth:
    """Log evidence and moments of models/NAME.py, given the arguments of its model."""
    return PROBLEMS[name](*arguments).solve()

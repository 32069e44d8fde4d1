"""Truths of the benchmarks agree with brute force: dense matrices, and grids that are fixed."""

import importlib.util
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.special import betaln, digamma, gammaln, logit, logsumexp, polygamma

ROOT = Path(__file__).parents[1]
# Data are of so many groups. A rule has so many points for each shared latent, whose bounds are
# here; without a number there are too many points for a rule.
SIZES = {
    "normal_groups": (5, 80, ((0, 14), (0.2, 14))),
    "radon_slopes": (3, None, ((0.01, 2), (0.01, 2), (0.3, 2))),
    "random_slopes": (3, None, ((0.01, 2), (0.01, 2), (-0.99, 0.99), (0.3, 2))),
    "logistic_groups": (3, 70, ((-9, 8), (0, 6))),
    "poisson_groups": (3, 70, ((-9, 8), (0, 6))),
    "beta_binomial": (4, 90, ((0, 1), (-6, 10))),
    "local_level": (8, 90, ((0, 7), (0, 13))),
}
# Of a column of the natural coordinates to that of benchmarks/truths.py, and the log Jacobian.
LOG = (np.log, np.log)
SAME = (lambda x: x, np.zeros_like)
COORDINATES = {
    "normal_groups": (LOG, LOG),
    "radon_slopes": (LOG, LOG, LOG),
    "random_slopes": (LOG, LOG, (np.arctanh, lambda x: np.log(1 - x**2)), LOG),
    "logistic_groups": (SAME, LOG),
    "poisson_groups": (SAME, LOG),
    "beta_binomial": ((logit, lambda x: np.log(x * (1 - x))), SAME),
    "local_level": (LOG, LOG),
}


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def truths():
    return load(ROOT / "benchmarks" / "truths.py")


def legendre(low, high, points):
    x, w = np.polynomial.legendre.leggauss(points)
    return low + (high - low) * (1 + x) / 2, np.log(w * (high - low) / 2)


def rule(points, *bounds):
    """Points of a product rule, (P, d), and log weights."""
    axes = [legendre(*b, points) for b in bounds]
    x = np.array(list(product(*(a[0] for a in axes))))
    return x, np.array(list(product(*(a[1] for a in axes)))).sum(1)


def exact(values):
    return values, np.zeros_like(values)


def gaussian(prior, design, s, y):
    """log p(y), mean and variance of g, where g ~ N(0, prior) and y ~ N(design g, s²)."""
    cross = prior @ design.T
    whole = design @ cross + s[:, None, None] ** 2 * np.eye(len(y))
    gain = np.swapaxes(np.linalg.solve(whole, np.swapaxes(cross, 1, 2)), 1, 2)
    fit = (
        y * np.linalg.solve(whole, np.broadcast_to(y, s.shape + y.shape)[..., None])[..., 0]
    ).sum(-1)
    log_p = -0.5 * (fit + np.linalg.slogdet(2 * np.pi * whole)[1])
    variance = np.einsum("pii->pi", prior) - (gain * cross).sum(-1)
    return log_p, gain @ y, variance


def half(x, scale):
    return stats.halfnorm.logpdf(x, scale=scale)


def normal_groups(x, y):
    tau, s = x.T
    groups, rows = y.shape
    prior = np.full((len(tau), groups + 1, groups + 1), 25.0)  # of u and mu
    prior[:, np.arange(groups), np.arange(groups)] += tau[:, None] ** 2
    design = np.eye(groups, groups + 1).repeat(rows, axis=0)
    log_p, mean, variance = gaussian(prior, design, s, y.ravel())
    u, mu = (mean[:, :-1], variance[:, :-1]), (mean[:, -1], variance[:, -1])
    return log_p + half(tau, 2) + half(s, 2), {"tau": exact(tau), "s": exact(s), "u": u, "mu": mu}


def radon_slopes(x, uranium, county, floor, level):
    tau_a, tau_b, sigma = x.T
    groups = len(uranium)
    mixing = np.zeros((2 * groups + 3, 2 * groups + 3))  # of mu_a, gamma, mu_b and offsets
    mixing[:groups, -3], mixing[:groups, -2], mixing[groups:-3, -1] = 1, uranium, 1
    np.fill_diagonal(mixing, 1)
    scales = np.concatenate(
        [
            tau_a[:, None].repeat(groups, 1),
            tau_b[:, None].repeat(groups, 1),
            np.full((len(sigma), 3), 5.0),
        ],
        1,
    )
    prior = (mixing * scales[:, None] ** 2) @ mixing.T
    design = np.zeros((len(level), 2 * groups + 3))
    rows = np.arange(len(level))
    design[rows, county], design[rows, groups + county] = 1, floor
    log_p, mean, variance = gaussian(prior, design, sigma, level)
    log_mass = log_p + half(tau_a, 1) + half(tau_b, 1) + half(sigma, 1)
    given = {"tau_a": exact(tau_a), "tau_b": exact(tau_b), "sigma": exact(sigma)}
    places = {"intercept": slice(groups), "slope": slice(groups, -3)}
    places |= {"mu_a": -3, "gamma": -2, "mu_b": -1}
    given |= {name: (mean[:, at], variance[:, at]) for name, at in places.items()}
    return log_mass, given


def random_slopes(z, group, x, y):
    tau, rho, s = z[:, :2], z[:, 2], z[:, 3]
    groups = group.max() + 1
    inner = tau[:, :, None] * tau[:, None] * np.eye(2)
    inner[:, 0, 1] = inner[:, 1, 0] = rho * tau.prod(1)
    prior = np.zeros((len(z), 2 * groups + 2, 2 * groups + 2))  # of u and beta
    for i in range(groups + 1):
        at = slice(2 * i, 2 * i + 2)
        if i < groups:
            prior[:, at, at] += inner
        for j in range(groups + 1):
            prior[:, at, 2 * j : 2 * j + 2] += 25 * np.eye(2)
    design = np.zeros((len(y), 2 * groups + 2))
    for row, (g, predictors) in enumerate(zip(group, x, strict=True)):
        design[row, 2 * g : 2 * g + 2] = predictors
    log_p, mean, variance = gaussian(prior, design, s, y)
    log_mass = log_p + half(tau, 2).sum(1) + np.log(0.75 * (1 - rho**2)) + half(s, 2)
    given = {"tau": exact(tau), "s": exact(s), "beta": (mean[:, -2:], variance[:, -2:])}
    u = (v[:, :-2].reshape(-1, groups, 2) for v in (mean, variance))
    factor = np.zeros((len(z), 2, 2))
    factor[:, 0, 0], factor[:, 1, 0], factor[:, 1, 1] = 1, rho, np.sqrt(1 - rho**2)
    return log_mass, given | {"u": tuple(u), "factor": exact(factor)}


def local_level(x, y):
    step, noise = x.T
    earlier = np.minimum(*np.indices((len(y), len(y))))
    prior = 25.0 + step[:, None, None] ** 2 * earlier
    log_p, mean, variance = gaussian(prior, np.eye(len(y)), noise, y)
    given = {"step": exact(step), "noise": exact(noise), "level": (mean, variance)}
    return log_p + half(step, 1) + half(noise, 2), given


def one_by_one(x, log_likelihood, groups):
    """Trapezoidal rule of u's offset from mu on a fixed grid."""
    mu, tau = x.T
    offset = np.linspace(-10, 10, 201)
    u = mu[:, None] + tau[:, None] * offset
    log_mass = stats.norm.logpdf(mu, 0, 2) + half(tau, 1)
    means, variances = np.empty((2, len(mu), groups))
    for i in range(groups):
        log_p = log_likelihood(i, u) + stats.norm.logpdf(offset) + np.log(0.1)
        total = logsumexp(log_p, axis=1)
        share = np.exp(log_p - total[:, None])
        means[:, i] = (share * u).sum(1)
        variances[:, i] = (share * (u - means[:, i, None]) ** 2).sum(1)
        log_mass = log_mass + total
    return log_mass, {"mu": exact(mu), "tau": exact(tau), "u": (means, variances)}


def logistic_groups(x, group, outcome):
    def log_likelihood(i, u):
        one = -np.log1p(np.exp(-u))
        return sum(one if y else one - u for y in outcome[group == i])

    return one_by_one(x, log_likelihood, group.max() + 1)


def poisson_groups(x, exposure, count):
    def log_likelihood(i, u):
        rows = zip(exposure[i], count[i], strict=True)
        return sum(stats.poisson.logpmf(y, e * np.exp(u)) for e, y in rows)

    return one_by_one(x, log_likelihood, len(count))


def beta_binomial(x, trials, successes):
    mean, log_size = x.T
    a, b = (v[:, None] for v in (mean * np.exp(log_size), (1 - mean) * np.exp(log_size)))
    log_mass = stats.betabinom.logpmf(successes, trials, a, b).sum(1)
    log_mass += stats.beta.logpdf(mean, 2, 2) + stats.norm.logpdf(log_size, 2, 1)
    a, b = a + successes, b + trials - successes
    p = np.exp(betaln(a + 1, b) - betaln(a, b))
    square = np.exp(betaln(a + 2, b) - betaln(a, b))
    size = exact(np.exp(log_size))
    return log_mass, {"mean": exact(mean), "size": size, "p": (p, square - p**2)}


def arguments(name):
    return [a.numpy() for a in load(ROOT / "models" / f"{name}.py").simulate(SIZES[name][0])]


@pytest.mark.parametrize("name", SIZES)
def test_density_and_moments_given_shared_latents(name, truths):
    """Those of dense matrices and fixed grids, at random values of the shared latents."""
    rng = np.random.default_rng(0)
    low, high = np.array(SIZES[name][2]).T
    x = low + (high - low) * (0.05 + 0.2 * rng.random((6, len(low))))
    log_p, given = globals()[name](x, *arguments(name))
    columns = list(zip(COORDINATES[name], x.T, strict=True))
    log_p = log_p + sum(jacobian(column) for (_, jacobian), column in columns)
    z = np.stack([change(column) for (change, _), column in columns], -1)

    problem = truths.PROBLEMS[name](*arguments(name))

    found = problem.given(z)
    np.testing.assert_allclose(problem.log_density(z), log_p, rtol=1e-8)
    assert found.keys() == given.keys()
    for site in given:
        for one, other in zip(found[site], given[site], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", [name for name, (_, points, _) in SIZES.items() if points])
def test_truth_agrees_with_gauss_s_rule(name, truths):
    _, points, bounds = SIZES[name]
    x, log_w = rule(points, *bounds)
    log_p, given = globals()[name](x, *arguments(name))
    log_evidence = logsumexp(log_p + log_w)
    weight = np.exp(log_p + log_w - log_evidence)

    found = truths.truth(name, *arguments(name))

    assert found.log_evidence == pytest.approx(log_evidence, abs=1e-5)
    assert found.mean.keys() == given.keys()
    for site, (m, v) in given.items():
        mean, second = (np.tensordot(weight, e, 1) for e in (m, v + m**2))
        np.testing.assert_allclose(found.mean[site], mean, rtol=0, atol=5e-5)
        np.testing.assert_allclose(found.sd[site], np.sqrt(second - mean**2), rtol=0, atol=5e-5)


@pytest.mark.parametrize("dim", [1, 3, 4])
def test_grid_finds_a_skewed_density(dim, truths):
    """Logarithms of gamma variables, mixed: evidence and moments are known."""
    shape = np.array([4.0, 20.0, 9.0, 2.5])[:dim]
    mixing = np.tril(np.full((dim, dim), 0.6)) + 0.4 * np.eye(dim)

    def log_density(x):
        logs = np.linalg.solve(mixing, (x - 3.0).T).T
        return (shape * logs - np.exp(logs)).sum(-1) - np.linalg.slogdet(mixing)[1]

    def given(x):
        return {"x": (x, np.ones_like(x))}

    found = truths.Problem(dim, log_density, given, 1).solve()

    mean, variance = digamma(shape), polygamma(1, shape)
    assert found.log_evidence == pytest.approx(gammaln(shape).sum(), abs=1e-6)
    np.testing.assert_allclose(found.mean["x"], 3.0 + mixing @ mean, atol=1e-5)
    np.testing.assert_allclose(found.sd["x"], np.sqrt(mixing**2 @ variance + 1.0), atol=1e-5)


def test_a_density_without_end_is_refused(truths):
    def log_density(x):
        return -np.logaddexp(0.0, x[:, 0] ** 2 / 1e4)

    problem = truths.Problem(1, log_density, lambda x: {"x": (x, 0 * x)}, 1)

    with pytest.raises(ValueError, match="shared latent 0 does not fall off"):
        problem.solve()

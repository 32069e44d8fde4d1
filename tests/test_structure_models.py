"""Models of many latents in models/: each has the density that its file says, in numpy."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit

import flowvi

FOLDER = Path(__file__).parents[1] / "models"


README = (FOLDER / "README.md").read_text()
SIZE = dict(re.findall(r"^\| `(\w+)\.py` \| (\d+) \|", README, re.MULTILINE))


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normal(x, mean, sd):
    return stats.norm.logpdf(x, mean, sd).sum()


def half(x, scale):
    return stats.halfnorm.logpdf(x, scale=scale).sum()


def bernoulli(y, logit):
    return stats.bernoulli.logpmf(y, expit(logit)).sum()


def lognormal(x, mean, sd):
    return stats.lognorm.logpdf(x, sd, scale=np.exp(mean)).sum()


def multivariate(x, mean, covariance):
    return stats.multivariate_normal.logpdf(x - mean, cov=covariance).sum()


def normal_scales(v):
    return normal(v["mu"], 0, 5) + half(v["tau"], 2) + half(v["s"], 2)


def normal_groups(v, y):
    u = v["u"].reshape(-1, 1)
    return normal_scales(v) + normal(u, v["mu"], v["tau"]) + normal(y, u, v["s"])


def normal_groups_noncentered(v, y):
    u = v["mu"] + v["tau"] * v["offset"][:, None]
    return normal_scales(v) + normal(v["offset"], 0, 1) + normal(y, u, v["s"])


def tied_groups(v, y):
    u = v["u"]
    rows = normal(u, 0, v["tau"]) + normal(y, v["mu"] + u[:, None], v["s"])
    return normal_scales(v) + rows + normal(u.sum(), 0, 0.01 * len(y))


def radon_slopes(v, uranium, county, floor, level):
    prior = sum(normal(v[name], 0, 5) for name in ("mu_a", "gamma", "mu_b"))
    prior += sum(half(v[name], 1) for name in ("tau_a", "tau_b", "sigma"))
    prior += normal(v["intercept"], v["mu_a"] + v["gamma"] * uranium, v["tau_a"])
    prior += normal(v["slope"], v["mu_b"], v["tau_b"])
    return prior + sum(
        normal(y, v["intercept"][c] + v["slope"][c] * f, v["sigma"])
        for c, f, y in zip(county, floor, level, strict=True)
    )


def logistic_groups(v, group, outcome):
    prior = normal(v["mu"], 0, 2) + half(v["tau"], 1) + normal(v["u"], v["mu"], v["tau"])
    return prior + bernoulli(outcome, v["u"][group])


def poisson_groups(v, exposure, count):
    prior = normal(v["mu"], 0, 2) + half(v["tau"], 1) + normal(v["u"], v["mu"], v["tau"])
    rate = exposure * np.exp(v["u"])[:, None]
    return prior + stats.poisson.logpmf(count, rate).sum()


def random_slopes(v, group, x, y):
    correlation = v["factor"] @ v["factor"].T
    prior = normal(v["beta"], 0, 5) + half(v["tau"], 2) + half(v["s"], 2)
    # (1 + r) / 2 is Beta(2, 2) where the concentration is 2 in two dimensions.
    prior += stats.beta.logpdf((1 + correlation[0, 1]) / 2, 2, 2) - np.log(2)
    prior += multivariate(v["u"], v["beta"], correlation * np.outer(v["tau"], v["tau"]))
    return prior + normal(y, np.einsum("nd,nd->n", x, v["u"][group]), v["s"])


def irt_persons(v, right):
    prior = lognormal(v["a"], 0, 0.5) + normal(v["b"], 0, 2) + normal(v["ability"], 0, 1)
    return prior + bernoulli(right, v["a"] * (v["ability"].reshape(-1, 1) - v["b"]))


def stochastic_volatility(v, y):
    phi = 2 * v["persistence"] - 1
    prior = normal(v["mu"], 0, 5) + half(v["sigma"], 1)
    prior += stats.beta.logpdf(v["persistence"], 20, 1.5)
    times = np.arange(len(y))
    covariance = v["sigma"] ** 2 / (1 - phi**2) * phi ** abs(times[:, None] - times)
    return prior + multivariate(v["h"], v["mu"], covariance) + normal(y, 0, np.exp(v["h"] / 2))


def local_level(v, y):
    times = np.arange(len(y))
    covariance = 25 + v["step"] ** 2 * np.minimum(times[:, None], times)
    prior = half(v["step"], 1) + half(v["noise"], 2)
    return prior + multivariate(v["level"], 0.0, covariance) + normal(y, v["level"], v["noise"])


def cox_grid(v, count, factor):
    side = len(count)
    cell = np.array([(i, j) for i in range(side) for j in range(side)])
    distance = np.sqrt(((cell[:, None] - cell) ** 2).sum(-1))
    covariance = 1.91 * np.exp(-33 * distance / side)
    prior = multivariate(v["field"], np.log(126) - 1.91 / 2, covariance)
    return prior + stats.poisson.logpmf(count.ravel(), np.exp(v["field"]) / side**2).sum()


def gp_counts(v, x, count):
    squares = (x[:, None] - x) ** 2
    covariance = v["alpha"] ** 2 * np.exp(-squares / (2 * v["rho"] ** 2)) + 1e-6 * np.eye(len(x))
    prior = normal(v["mean"], 0, 3) + half(v["alpha"], 2) + lognormal(v["rho"], -1.5, 0.5)
    prior += multivariate(v["f"], v["mean"], covariance)
    return prior + stats.poisson.logpmf(count, np.exp(v["f"])).sum()


def beta_binomial(v, trials, successes):
    a, b = v["mean"] * v["size"], (1 - v["mean"]) * v["size"]
    prior = stats.beta.logpdf(v["mean"], 2, 2) + lognormal(v["size"], 2, 1)
    prior += stats.beta.logpdf(v["p"], a, b).sum()
    return prior + stats.binom.logpmf(successes, trials, v["p"]).sum()


def crossed_groups(v, person, item, rating):
    prior = normal(v["mu"], 0, 5) + sum(half(v[name], 1) for name in ("tau_u", "tau_v", "s"))
    prior += normal(v["u"], 0, v["tau_u"]) + normal(v["v"], 0, v["tau_v"])
    return prior + normal(rating, v["mu"] + v["u"][person] + v["v"][item], v["s"])


def dense_logistic(v, x, outcome):
    return half(v["scale"], 1) + normal(v["w"], 0, v["scale"]) + bernoulli(outcome, x @ v["w"])


# Number of groups, persons, times, or cells a side; the density; sites that are positive, and
# those in the unit interval.
MODELS = {
    "normal_groups": (4, normal_groups, ("tau", "s"), ()),
    "normal_groups_noncentered": (4, normal_groups_noncentered, ("tau", "s"), ()),
    "tied_groups": (4, tied_groups, ("tau", "s"), ()),
    "radon_slopes": (4, radon_slopes, ("tau_a", "tau_b", "sigma"), ()),
    "logistic_groups": (4, logistic_groups, ("tau",), ()),
    "poisson_groups": (4, poisson_groups, ("tau",), ()),
    "random_slopes": (4, random_slopes, ("tau", "s"), ()),
    "irt_persons": (4, irt_persons, ("a",), ()),
    "stochastic_volatility": (7, stochastic_volatility, ("sigma",), ("persistence",)),
    "local_level": (7, local_level, ("step", "noise"), ()),
    "cox_grid": (4, cox_grid, (), ()),
    "gp_counts": (5, gp_counts, ("alpha", "rho"), ()),
    "beta_binomial": (4, beta_binomial, ("size",), ("mean", "p")),
    "crossed_groups": (4, crossed_groups, ("tau_u", "tau_v", "s"), ()),
    "dense_logistic": (4, dense_logistic, ("scale",), ()),
}


# A kernel matrix with a jitter of 1e-6: two libraries' Cholesky factors agree to fewer digits.
ROUNDING = {"gp_counts": 1e-8}


@pytest.mark.parametrize("name", MODELS)
def test_density_is_the_one_written_by_hand(name, default):
    size, density, positive, unit = MODELS[name]
    module = load(name)
    arguments = module.simulate(size)
    target = flowvi.from_pyro(module.model, *arguments)
    z = 0.5 * torch.randn(3, target.dim, dtype=torch.float64)

    found = target.log_prob(z.requires_grad_())
    (gradient,) = torch.autograd.grad(found.sum(), z)

    assert target.dtype == torch.float64 and not target.improper
    assert gradient.isfinite().all() and (gradient != 0).all()
    for at, log_p in zip(z.detach(), found.tolist(), strict=True):
        values = {k: v.numpy() for k, v in target.constrain(at).items()}
        jacobian = sum(np.log(values[k]).sum() for k in positive)
        jacobian += sum(np.log(values[k] * (1 - values[k])).sum() for k in unit)
        if "factor" in values:  # its lower entry is the hyperbolic tangent of a coordinate
            jacobian += np.log(1 - values["factor"][1, 0] ** 2)
        hand = density(values, *(a.numpy() for a in arguments)) + jacobian
        assert log_p == pytest.approx(hand, rel=ROUNDING.get(name, 1e-9), abs=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_size_and_seed_make_the_data(name):
    simulate, size = load(name).simulate, MODELS[name][0]

    first, again, other = simulate(size), simulate(size, 0), simulate(size, 1)

    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(
        a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, other, strict=True)
    )


@pytest.mark.parametrize("name", MODELS)
def test_default_data_are_of_the_size_that_the_list_says(name):
    module = load(name)

    arguments = module.data()

    assert all(torch.equal(a, b) for a, b in zip(arguments, module.simulate(), strict=True))
    assert flowvi.from_pyro(module.model, *arguments).dim == int(SIZE[name])


def test_three_slopes_have_a_density():
    module = load("random_slopes")
    target = flowvi.from_pyro(module.model, *module.simulate(4, dim=3))

    assert target.log_prob(torch.randn(2, target.dim, dtype=torch.float64)).isfinite().all()


def test_draws_of_a_series_have_its_density():
    """The density of draws is that of their noise, scaled."""
    phi, sigma = torch.tensor([0.9, -0.5]), torch.tensor([0.3, 2.0])
    series = load("stochastic_volatility").Autoregression(torch.tensor([1.0, -1.0]), phi, sigma, 6)
    walk = load("local_level").RandomWalk(torch.tensor([5.0, 1.0]), sigma, 6)
    noise = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(1))
    log_noise = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(-1)

    torch.manual_seed(1)
    h = series.sample((3,))
    torch.manual_seed(1)
    x = walk.sample((3,))

    scale = (1 - phi**2).log() / 2 - 6 * sigma.log()
    torch.testing.assert_close(series.log_prob(h), log_noise + scale)
    scale = -torch.tensor([5.0, 1.0]).log() - 5 * sigma.log()
    torch.testing.assert_close(walk.log_prob(x), log_noise + scale)

"""Structured fits: units left out, and units that were not in the fit."""

import math
from functools import cache

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy.special import gammaln, logsumexp

import flowvi
from flowvi.compat.arviz_groups import group_names
from flowvi.interop.read_draws import draws_of, resample_groups

GROUPS, EACH = 8, 3
# Of the log of tau, a priori.
CENTRE, WIDTH = -0.3, 0.2
COUNTS = np.array([3, 0, 1, 5, 4, 9, 2, 2, 6, 1, 0, 0, 3, 7, 4, 2, 1, 3, 8, 12, 9, 0, 2, 1.0])
# The shape of the weights of this posterior of eight groups is near the limit.
pytestmark = pytest.mark.filterwarnings("ignore:Pareto k-hat")
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def counts(y, group):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 1.0))
    tau = pyro.sample("tau", dist.LogNormal(y.new_tensor(CENTRE), WIDTH))
    with pyro.plate("group", int(group.max()) + 1):
        u = pyro.sample("u", dist.Normal(mu, tau))
    with pyro.plate("row", len(group)):
        pyro.sample("y", dist.Poisson(u[group].exp()), obs=y if len(y) == len(group) else None)


def groups_of(count: int) -> torch.Tensor:
    return torch.arange(count).repeat_interleave(EACH)


@cache
def fitted(dtype: torch.dtype) -> flowvi.Draws:
    torch.set_default_dtype(dtype)
    target = flowvi.from_pyro(counts, torch.tensor(COUNTS, dtype=dtype), groups_of(GROUPS))
    return flowvi.fit(target, "structured", progress=False).draw(4000)


def unit_likelihoods(mu: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """Log p(y_i | mu, tau) of each group by quadrature, (GROUPS, *shape)."""
    nodes, weights = hermegauss(80)
    u = mu[..., None] + tau[..., None] * nodes
    found = []
    for y in COUNTS.reshape(GROUPS, EACH):
        terms = y.sum() * u - EACH * np.exp(u) - gammaln(y + 1).sum()
        found.append(logsumexp(terms, axis=-1, b=weights / math.sqrt(2 * math.pi)))
    return np.stack(found)


def exact_left_out() -> np.ndarray:
    """Log p(y_i | all other groups) by quadrature over mu and log tau, (GROUPS)."""
    mu, log_tau = np.meshgrid(np.linspace(-4, 4, 161), np.linspace(-2, 1.4, 161), indexing="ij")
    each = unit_likelihoods(mu, np.exp(log_tau))
    log_p = each.sum(0) - mu**2 / 2 - (log_tau - CENTRE) ** 2 / (2 * WIDTH**2)
    return logsumexp(log_p) - np.array([logsumexp(log_p - one) for one in each])


@PRECISIONS
def test_units_left_out_are_exact(dtype):
    draws = fitted(dtype)

    record = flowvi.loo(draws, units=True)

    exact = exact_left_out()
    # Errors of importance sampling, by the weights that a left-out unit leaves.
    likelihood = unit_likelihoods(draws["mu"].ravel(), draws["tau"].ravel())
    log_r = draws.log_weights.ravel() - likelihood
    ratio = np.exp(likelihood + log_r - logsumexp(log_r, axis=1)[:, None] - exact[:, None])
    share = np.exp(log_r - logsumexp(log_r, axis=1)[:, None])
    se = np.sqrt(((ratio - share) ** 2).sum(1))
    np.testing.assert_array_less(np.abs(record.loo_i.values - exact), 4.5 * se)
    assert record.loo_i.dims == ("group",)
    resampled = flowvi.loo(flowvi.resample(draws, seed=1), units=True)
    value = getattr(resampled, "elpd_loo", None) or resampled.elpd
    assert float(value) == pytest.approx(exact.sum(), abs=6 * se.sum())


@PRECISIONS
def test_each_unit_has_its_likelihood(dtype):
    """Estimates by K draws have a mean of one relative to the exact likelihood."""
    draws = fitted(dtype)
    exact = unit_likelihoods(draws["mu"][0], draws["tau"][0]).T

    ratio = np.exp(draws.unit_scores[0] - exact)

    se = ratio.std(0) / math.sqrt(len(ratio))
    np.testing.assert_array_less(np.abs(ratio.mean(0) - 1), 4.5 * se + 1e-5)


def test_units_are_groups_of_a_file():
    draws = fitted(torch.float64)

    idata = flowvi.to_inference_data(draws)

    assert {"unit_log_likelihood", "unit_diagnosis"} <= set(group_names(idata))
    scores = idata["unit_log_likelihood"]["group_units"]
    assert scores.dims == ("chain", "draw", "group")
    # Files have four chains.
    np.testing.assert_array_equal(scores, draws.unit_scores.reshape(4, -1, GROUPS))
    assert idata["posterior"]["u"].dims == ("chain", "draw", "group")
    assert idata["unit_diagnosis"]["unit_khat"].dims == ("group",)
    back = draws_of(resample_groups(idata))
    assert str(back.units) == str(draws.units) and back.units.plate == "group"
    assert back.unit_scores.shape == draws.unit_scores.shape
    a, b = (flowvi.loo(source, units=True) for source in (draws, idata))
    np.testing.assert_array_equal(a.loo_i, b.loo_i)


def test_units_need_a_structured_fit():
    target = flowvi.from_pyro(counts, torch.tensor(COUNTS), groups_of(GROUPS))
    draws = flowvi.fit(target, "meanfield", steps=2, progress=False).draw(200)
    with pytest.raises(ValueError, match="units=True needs likelihoods of units"):
        flowvi.loo(draws, units=True)


def test_too_many_scores_are_left_out(monkeypatch):
    from flowvi.draws import structured

    torch.set_default_dtype(torch.float64)
    target = flowvi.from_pyro(counts, torch.tensor(COUNTS), groups_of(GROUPS))
    fit = flowvi.fit(target, "structured", steps=1, progress=False)
    monkeypatch.setattr(structured, "MOST_SCORES", 100 * GROUPS)

    assert fit.draw(100).unit_scores.shape == (1, 100, GROUPS)
    assert fit.draw(101).unit_scores is None


@PRECISIONS
def test_new_units_have_the_predictive_moments(dtype):
    """Of the log of the rate: mean mu, variance tau^2, one for all rows of a group."""
    draws, new = fitted(dtype), groups_of(2)
    mu, tau = (draws[name].ravel().astype(float) for name in ("mu", "tau"))

    found = flowvi.predict(draws, torch.zeros(0, dtype=dtype), new, new_units="group", seed=2)

    u = found["u"].reshape(-1, 2)
    assert found["y"].shape == (*draws.log_p.shape, 2 * EACH)
    standard = (u - mu[:, None]) / tau[:, None]
    n = standard.size
    assert abs(standard.mean()) < 4.5 / math.sqrt(n)
    assert abs(standard.var() - 1) < 4.5 * math.sqrt(2 / n)
    assert abs(np.corrcoef(standard.T)[0, 1]) < 4.5 / math.sqrt(len(u))
    assert abs(np.corrcoef(standard[:, 0], mu)[0, 1]) < 4.5 / math.sqrt(len(u))
    rate = np.exp(np.repeat(u, EACH, 1))
    left = (found["y"].reshape(rate.shape) - rate) / np.sqrt(rate)
    # Rows of a group share an u, and given it are independent.
    assert abs(left.mean()) < 4.5 / math.sqrt(left.size)
    assert abs((left[:, 0] * left[:, 1]).mean()) < 4.5 / math.sqrt(len(u))


def test_data_of_new_units_are_scored():
    """Their mean density over draws is p(y_n) of a group given the other groups."""
    draws = flowvi.resample(fitted(torch.float64), seed=3)
    y = torch.tensor([2.0, 0.0])

    # With one row in each group, rows and groups are one and the same.
    found = flowvi.predict(draws, y, torch.arange(2), new_units=["u"], seed=4)

    nodes, weights = hermegauss(80)
    u = draws["mu"][0][:, None] + draws["tau"][0][:, None] * nodes
    for value, density, scores in zip(
        y.tolist(),
        found.log_density("y"),
        np.moveaxis(found.log_likelihood["y"][0], 1, 0),
        strict=True,
    ):
        each = np.exp(value * u - np.exp(u) - gammaln(value + 1)) @ weights / math.sqrt(2 * math.pi)
        se = np.exp(scores).std() / math.sqrt(len(scores)) / each.mean()
        assert abs(density - math.log(each.mean())) < 4.5 * se


def test_known_units_are_predicted_as_ever():
    draws = fitted(torch.float64)
    y, groups = torch.tensor(COUNTS), groups_of(GROUPS)

    found = flowvi.predict(draws, y, groups)

    assert "u" not in found.values
    np.testing.assert_allclose(
        found.log_likelihood["y"][0, 0],
        flowvi.to_inference_data(draws)["log_likelihood"]["y"].values[0, 0],
        rtol=1e-12,
    )


def test_other_units_are_refused_with_the_way_out():
    draws, y = fitted(torch.float64), torch.zeros(0)
    with pytest.raises(flowvi.ModelError, match=r"'u' has shape \(8,\).*new_units='group'"):
        flowvi.predict(draws, y, groups_of(5))
    with pytest.raises(ValueError, match=r"No new_units named 'groups'\. Did you mean group"):
        flowvi.predict(draws, y, groups_of(5), new_units="groups")


def test_all_latents_can_be_new():
    draws = fitted(torch.float64).thinned(500)

    found = flowvi.predict(
        draws, torch.zeros(0), groups_of(2), new_units=["mu", "tau", "group"], seed=5
    )

    assert found["mu"].shape == draws.log_p.shape
    assert abs(found["mu"].mean()) < 4.5 / math.sqrt(500)

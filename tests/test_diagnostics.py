"""k-hat, evidence, bounds and moments are those that theory gives, with the right errors."""

import math
from functools import partial
from importlib import import_module

import arviz as az
import numpy as np
import pytest
from normal_weights import gaussian
from scipy.special import logsumexp

from flowvi.compat.arviz_groups import has_trees
from flowvi.diagnostics import (
    elbo,
    gap,
    iw_bounds,
    khat_threshold,
    log_evidence,
    psis,
)
from flowvi.diagnostics.importance import Estimate, debiased, with_tail
from flowvi.diagnostics.moments import compare


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_log_evidence_covers_the_truth(rng):
    """Log-normal weights with mean one have log evidence zero."""
    log_w = rng.normal(-0.125, 0.5, size=20_000)

    value, se = log_evidence(log_w)

    assert 0 < se < 0.01
    assert abs(value) < 4 * se


def test_log_evidence_survives_tiny_weights():
    value, _ = log_evidence(np.full(100, -5000.0))

    assert value == pytest.approx(-5000.0, abs=1e-9)


def test_gap_is_the_divergence(rng):
    """For log-normal weights KL(q || p) is half the variance of the log weights."""
    value, se = gap(rng.normal(3.0, 0.5, size=20_000))

    assert abs(value - 0.125) < 4 * se


def test_standard_errors_match_the_scatter_of_repetitions(rng):
    """The mean squared standard error is the variance over repetitions, within 20 %."""
    sets = rng.normal(-0.125, 0.5, size=(1000, 400))

    for estimate in (log_evidence, elbo, gap, partial(debiased, particles=1)):
        values, errors = np.transpose([estimate(log_w) for log_w in sets])
        # The ratio's own standard error is about sqrt(2 / 1000) = 4.5 %.
        assert np.mean(errors**2) / np.var(values) == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("draws", [100, 101, 102, 103, 4000])
@pytest.mark.parametrize("spread", [0.02, 0.5, 2.0, 8.0])
@pytest.mark.parametrize("outside", [0.0, 0.3, 0.95])
def test_khat_and_weights_are_arviz(rng, draws, spread, outside):
    """Of light tails and heavy ones; where few weights are not zero, nothing is smoothed."""
    log_w = spread * rng.normal(size=draws)
    log_w[: int(outside * draws)] = -np.inf

    smooth, khat = psis(log_w)
    if has_trees():  # what it smooths are likelihoods, whose weights are their inverse
        expected, expected_khat = import_module("arviz_stats.base").array_stats.psislw(-log_w)
    else:
        expected, expected_khat = az.psislw(log_w)

    np.testing.assert_allclose(smooth, expected, rtol=1e-7, atol=1e-9)
    assert khat == pytest.approx(float(expected_khat))


def test_khat_finds_the_shape_of_a_pareto_tail(rng):
    """Weights u^(-k) have tail shape k; the fit to n points errs by (1 + k) / sqrt(n)."""
    shape, draws = 0.5, 100_000
    tail = 3 * math.sqrt(draws)

    _, khat = psis(-shape * np.log(rng.uniform(size=draws)))

    assert abs(khat - shape) < 4 * (1 + shape) / math.sqrt(tail)


def test_the_error_of_the_evidence_has_the_mass_of_the_tail_that_no_draw_shows():
    """Of weights u^(-k) of S uniform numbers, those of u < 1 / S are S^(k - 1) of the mass."""
    shape, draws = 0.5, 100_000
    log_w = -shape * np.log((np.arange(draws) + 0.5) / draws)

    found = with_tail(Estimate(log_evidence(log_w).value, 0.0), log_w, shape)

    # The largest of so many evenly spaced numbers stand for the tail, which they cut coarsely.
    assert found.se == pytest.approx(draws ** (shape - 1), rel=0.05)
    assert with_tail(Estimate(0.3, 0.4), log_w, -math.inf) == (0.3, 0.4)


def test_khat_threshold_grows_with_the_draws():
    assert khat_threshold(100) == pytest.approx(0.5)
    assert khat_threshold(10**6) == 0.7


def test_khat_of_bounded_weights_is_minus_infinity(rng):
    """A guide that covers a truncated target: weights are a constant or zero."""
    log_w = np.where(rng.uniform(size=1000) < 0.5, 0.7, -np.inf)

    smooth, khat = psis(log_w)

    assert khat == -math.inf
    assert np.exp(smooth).sum() == pytest.approx(1.0)


def test_bounds_are_ordered(rng):
    """ELBO = L_1 < L_10 < L_100 < log evidence, on the same draws."""
    log_w, _ = gaussian(rng, loc=1.0, draws=20_000, evidence=0.7)

    table = iw_bounds(log_w, (1, 10, 100))

    first, *others = table
    assert first.bound == pytest.approx(elbo(log_w).value)
    assert first.se == pytest.approx(elbo(log_w).se)
    assert first.bound < others[0].bound < others[1].bound < 0.7 + 4 * others[1].se


def test_bounds_are_unbiased(rng):
    """The bounds of many small tables average to L_K from fresh blocks of K draws."""
    repeats = [iw_bounds(rng.normal(0.0, 1.5, size=130), (50,))[0] for _ in range(400)]
    values = np.array([row.bound for row in repeats])
    fresh = np.log(np.mean(np.exp(rng.normal(0.0, 1.5, size=(20_000, 50))), axis=1))

    difference = values.mean() - fresh.mean()
    se = math.hypot(values.std() / 20, fresh.std() / math.sqrt(20_000))

    assert abs(difference) < 4 * se
    assert np.mean([row.se**2 for row in repeats]) > 0.7 * values.var()


def test_bounds_say_what_the_draws_cannot_give(rng):
    table = iw_bounds(rng.normal(size=400), (300, 1000))

    assert math.isfinite(table[0].bound) and math.isnan(table[0].se)
    assert math.isnan(table[1].bound)
    assert "needs at least 1000 draws" in str(table)


def test_bounds_refuse_no_particles(rng):
    with pytest.raises(ValueError, match="particles must be a whole number of at least 1; got 0"):
        iw_bounds(rng.normal(size=400), (0,))


@pytest.fixture(scope="module")
def repetitions():
    """Comparisons of N(0, 0.95^2) with N(0, 1), each from 1000 fresh draws."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        log_w, values = gaussian(rng, scale=0.95, draws=1000, dim=1)
        weights = np.exp(log_w - logsumexp(log_w))[None]
        found.append((weights, values["x"][None]))
    inside = np.full((1, 1000), True)
    return found, [compare(weights, inside, {"x": x}) for weights, x in found]


def test_what_reweighting_does_is_the_way_from_the_guide_to_the_target(rng):
    """From N(0.3, 0.8^2) to N(0, 1): down by 0.3 sd, and wider by log 1.25."""
    log_w, values = gaussian(rng, loc=0.3, scale=0.8, draws=20_000, dim=1)
    weights, x = np.exp(log_w - logsumexp(log_w))[None], values["x"][None]

    found = compare(weights, np.full((1, 20_000), True), {"x": x})

    assert abs(found.shift[0] + 0.3) < 4.5 * found.shift_se[0] < 0.1
    assert abs(found.stretch[0] + math.log(0.8)) < 4.5 * found.stretch_se[0] < 0.1


def test_rhat_is_that_of_restarts_a_sd_apart(rng):
    """sqrt(1 + 1 / 2), the variance of two means over that of the draws; 1 when reweighted."""
    chains = [gaussian(rng, loc=loc, draws=20_000, dim=1) for loc in (-0.5, 0.5)]
    log_w = np.stack([log_w for log_w, _ in chains])
    x = np.stack([values["x"] for _, values in chains])

    found = compare(np.exp(log_w - logsumexp(log_w)), np.full(log_w.shape, True), {"x": x})

    # The distance of the means has an error of 0.01 sds.
    assert found.rhat[0] == pytest.approx(1.5**0.5, abs=4.5 * 0.01 / (2 * 1.5**0.5))
    assert found.rhat_weighted[0] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("moment", ["shift", "stretch"])
def test_errors_of_what_reweighting_does_match_its_scatter(repetitions, moment):
    """Over 400 repetitions a ratio of variances has a standard error of 7 %."""
    _, comparisons = repetitions
    values, errors = np.transpose(
        [[getattr(c, moment)[0], getattr(c, f"{moment}_se")[0]] for c in comparisons]
    )

    assert np.mean(errors**2) / values.var() == pytest.approx(1.0, abs=4 * 0.07)


@pytest.mark.parametrize(("moment", "variance"), [("mean", 1.0), ("sd", 0.5)])
def test_effective_draws_foretell_the_error_of_a_moment(repetitions, moment, variance):
    """One draw of N(0, 1) knows the mean to a variance of 1, the log sd to one of 1/2."""
    sets, comparisons = repetitions
    means = np.array([(weights[..., None] * x).sum() for weights, x in sets])
    squares = np.array([(weights[..., None] * x**2).sum() for weights, x in sets])
    estimate = {"mean": means, "sd": np.log(squares - means**2) / 2}[moment]

    foretold = np.mean([variance / getattr(c, f"ess_{moment}")[0] for c in comparisons])

    assert foretold / estimate.var() == pytest.approx(1.0, abs=4 * 0.07)

"""Diagnostics recover what is known exactly, and distrust what should not be trusted."""

import math

import arviz as az
import numpy as np
import pytest

from flowvi.diagnostics import (
    diagnose,
    elbo,
    gap,
    iw_bounds,
    khat_threshold,
    log_evidence,
    psis,
)

TRUST, RESAMPLE, DISTRUST = "trust", "trust the resampled draws", "do not trust"


def gaussian(rng, loc=0.0, scale=1.0, draws=4000, dim=3, evidence=0.0):
    """Draws of N(loc, scale^2 I), and their log weights under N(0, I) times e^evidence."""
    eps = rng.normal(size=(draws, dim))
    z = loc + scale * eps
    log_w = (eps**2 - z**2).sum(-1) / 2 + dim * math.log(scale) + evidence
    return log_w, {"x": z}


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

    for estimate in (log_evidence, elbo, gap):
        values, errors = np.transpose([estimate(log_w) for log_w in sets])
        # The ratio's own standard error is about sqrt(2 / 1000) = 4.5 %.
        assert np.mean(errors**2) / np.var(values) == pytest.approx(1.0, abs=0.2)


def test_khat_and_weights_are_arviz(rng):
    log_w = 2 * rng.normal(size=4000)

    smooth, khat = psis(log_w)
    expected, expected_khat = az.psislw(log_w)

    np.testing.assert_allclose(smooth, expected)
    assert khat == pytest.approx(float(expected_khat))


def test_khat_finds_the_shape_of_a_pareto_tail(rng):
    """Weights u^(-k) have tail shape k; the fit to n points errs by (1 + k) / sqrt(n)."""
    shape, draws = 0.5, 100_000
    tail = 3 * math.sqrt(draws)

    _, khat = psis(-shape * np.log(rng.uniform(size=draws)))

    assert abs(khat - shape) < 4 * (1 + shape) / math.sqrt(tail)


def test_khat_threshold_grows_with_the_draws():
    assert khat_threshold(100) == pytest.approx(0.5)
    assert khat_threshold(10**6) == 0.7


def test_khat_of_bounded_weights_is_minus_infinity(rng):
    """A guide that covers a truncated target: weights are a constant or zero."""
    log_w = np.where(rng.uniform(size=1000) < 0.5, 0.7, -np.inf)

    smooth, khat = psis(log_w)

    assert khat == -math.inf
    assert np.exp(smooth).sum() == pytest.approx(1.0)


@pytest.mark.parametrize("spread", [500.0, 5000.0])
def test_hopeless_weights_are_distrusted_without_a_warning(rng, spread):
    d = diagnose(spread * rng.normal(size=1000))

    assert d.khat > d.khat_threshold
    assert d.verdict == DISTRUST


def test_one_draw_with_all_the_weight_is_distrusted():
    log_w = np.full(200, -np.inf)
    log_w[17] = 0.0

    d = diagnose(log_w)

    assert d.khat == math.inf
    assert d.verdict == DISTRUST


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
    with pytest.raises(ValueError, match="particles must be at least 1; got 0"):
        iw_bounds(rng.normal(size=400), (0,))


def test_perfect_guide_is_trusted(rng):
    log_w, values = gaussian(rng, evidence=-4.0)

    d = diagnose(log_w + 1e-5 * rng.normal(size=4000), values)

    assert d.verdict == TRUST
    assert d.khat == -math.inf
    assert d.log_evidence == pytest.approx(-4.0, abs=1e-5)
    assert any("constant to rounding" in reason for reason in d.reasons)


@pytest.mark.parametrize(
    ("loc", "scale", "dim", "verdict"),
    [
        (0.03, 1.0, 3, TRUST),
        (0.0, 1.04, 3, TRUST),
        (0.3, 1.0, 3, RESAMPLE),
        (0.0, 1.3, 3, RESAMPLE),
        (3.0, 1.0, 3, DISTRUST),
        (0.0, 0.5, 10, DISTRUST),
    ],
)
def test_verdict_follows_the_error_of_the_moments(rng, loc, scale, dim, verdict):
    log_w, values = gaussian(rng, loc, scale, dim=dim)

    d = diagnose(log_w, values)

    assert d.verdict == verdict
    assert str(d).startswith(f"Verdict: {verdict}\n")


@pytest.mark.parametrize("dim", [2, 30])
def test_trust_is_calibrated(rng, dim):
    """Over guides of all qualities, "trust" is never given to a moment that is off by 15 %."""
    trusted = 0
    for _ in range(60):
        loc, scale = rng.normal(0.0, 0.15), math.exp(rng.normal(0.0, 0.1))
        verdict = diagnose(*gaussian(rng, loc, scale, dim=dim)).verdict
        if verdict == TRUST:
            trusted += 1
            assert abs(loc) < 0.15
            assert abs(math.log(scale)) < math.log(1.15)
    assert trusted


def test_log_weights_alone_are_judged_by_the_divergence(rng):
    """KL(q || p) <= 0.15^2 / 2 moves no Gaussian mean by 0.15 sd."""
    near, _ = gaussian(rng, loc=0.05, dim=1)
    far, _ = gaussian(rng, loc=0.2, dim=1)

    assert diagnose(near).verdict == TRUST
    assert diagnose(far).verdict == RESAMPLE


def test_too_few_effective_draws_are_said_to_be_too_few(rng):
    log_w, values = gaussian(rng, loc=0.5, draws=500)

    d = diagnose(log_w, values)

    assert d.khat < d.khat_threshold
    assert d.verdict == DISTRUST
    assert any("effective draws" in reason for reason in d.reasons)


def test_zero_weights_forbid_the_plain_draws(rng):
    """Half a normal, covered by a normal: half of the draws are outside the support."""
    z = rng.normal(size=4000)
    log_w = np.where(z > 0, math.log(2.0), -np.inf)

    d = diagnose(log_w, {"z": z})

    assert d.verdict == RESAMPLE
    assert abs(d.log_evidence) < 4 * d.log_evidence_se
    assert d.elbo == -math.inf
    assert any("weight zero" in reason for reason in d.reasons)


def test_restarts_that_agree_are_trusted(rng):
    sets = [gaussian(rng, 0.02) for _ in range(3)]

    d = diagnose([log_w for log_w, _ in sets], {"x": np.stack([v["x"] for _, v in sets])})

    assert d.verdict == TRUST
    assert d.draws == 12_000


def test_restarts_in_different_modes_are_distrusted(rng):
    """Each of two guides fits one of two equal modes, and cannot see the other."""
    log_w = np.full((2, 2000), -math.log(2.0))
    z = np.array([-6.0, 6.0])[:, None] + rng.normal(size=(2, 2000))

    d = diagnose(log_w, {"z": z})

    assert d.verdict == DISTRUST
    assert any("R-hat" in reason for reason in d.reasons)


def test_restarts_with_different_evidence_are_distrusted(rng):
    log_w = np.array([0.0, -0.7])[:, None] + 0.1 * rng.normal(size=(2, 2000))

    d = diagnose(log_w)

    assert d.verdict == DISTRUST
    assert any("disagree about the evidence" in reason for reason in d.reasons)


def test_a_restart_that_failed_does_not_spoil_the_evidence(rng):
    good, values = gaussian(rng, evidence=2.0)
    bad, far = gaussian(rng, loc=9.0, evidence=2.0)

    d = diagnose([good, bad - 100], {"x": np.stack([values["x"], far["x"]])})

    assert d.verdict == RESAMPLE
    assert d.log_evidence == pytest.approx(2.0)
    assert any("Restart 1" in reason for reason in d.reasons)


def test_values_that_are_not_finite_are_named(rng):
    log_w, values = gaussian(rng)
    broken = np.where(rng.uniform(size=4000) < 0.01, np.nan, 1.0)

    d = diagnose(log_w, {**values, "ratio": broken, "constant": np.ones((4000, 2))})

    assert d.verdict == TRUST
    assert any("'ratio'" in reason for reason in d.reasons)


def test_improper_priors_have_no_evidence(rng):
    d = diagnose(gaussian(rng)[0], improper=["mu", "tau"])

    assert math.isnan(d.log_evidence) and math.isnan(d.log_evidence_se)
    assert d.gap == pytest.approx(0.0, abs=1e-9)
    assert any("'mu', 'tau' is improper" in reason for reason in d.reasons)
    assert "none" in str(d)


@pytest.mark.parametrize(
    ("log_w", "message"),
    [
        (np.zeros(5), ">= 100 draws"),
        (np.zeros((4000, 1)), "each of 4000"),
        (np.zeros((2, 3, 100)), "shape"),
        (np.r_[np.nan, np.inf, np.zeros(200)], "2 of 202 log weights are NaN"),
        (np.full(200, -np.inf), "Every log weight is -inf"),
    ],
)
def test_impossible_weights_are_refused(log_w, message):
    with pytest.raises(ValueError, match=message):
        diagnose(log_w)


def test_values_of_another_length_are_refused(rng):
    with pytest.raises(ValueError, match=r"'x' must begin with the shape \(200,\)"):
        diagnose(np.zeros(200), {"x": np.zeros(100)})

"""The verdict trusts what is near the target, and never what is far from it."""

import math

import numpy as np
import pytest
from normal_weights import gaussian
from scipy import stats

from flowvi.diagnostics import diagnose

TRUST, RESAMPLE, DISTRUST = "trust", "trust the resampled draws", "do not trust"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_one_draw_with_all_the_weight_is_distrusted():
    log_w = np.full(200, -np.inf)
    log_w[17] = 0.0

    d = diagnose(log_w)

    assert d.khat == math.inf
    assert d.verdict == DISTRUST


@pytest.mark.parametrize("spread", [500.0, 5000.0])
def test_hopeless_weights_are_distrusted_without_a_warning(rng, spread):
    d = diagnose(spread * rng.normal(size=1000))

    assert d.khat > d.khat_threshold
    assert d.verdict == DISTRUST


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


def test_a_heavy_tail_of_nearly_equal_weights_is_no_reason_for_distrust(rng):
    """A normal for a Student t with 30 degrees of freedom: infinite variance, KL of 0.001."""
    z = 1.02 * rng.normal(size=4000)
    log_w = stats.t.logpdf(z, 30) - stats.norm.logpdf(z, scale=1.02)

    d = diagnose(log_w, {"z": z})

    assert d.khat > 1
    assert d.verdict == TRUST
    assert any("hardly vary" in reason for reason in d.reasons)


def test_moments_that_rest_on_few_draws_are_too_little_to_resample(rng):
    """Ten of 4000 draws hold the outskirts; 1 / sum w^2 does not see how much rests on them."""
    log_w, x = np.zeros(4000), 0.3 * rng.normal(size=4000)
    log_w[:10], x[:10] = 3.5, 4 * rng.choice([-1, 1], size=10)

    d = diagnose(log_w, {"x": x})

    assert d.khat < d.khat_threshold
    assert d.ess > 500
    assert d.verdict == DISTRUST
    assert any("effective draws for the mean of x" in reason for reason in d.reasons)


def test_too_few_effective_draws_are_said_to_be_too_few(rng):
    log_w, values = gaussian(rng, loc=0.5, draws=500)

    d = diagnose(log_w, values)

    assert d.khat < d.khat_threshold
    assert d.verdict == DISTRUST
    assert any("effective draws" in reason for reason in d.reasons)


def test_a_moment_that_no_draws_tell_is_named(rng):
    """Of a Cauchy variable neither mean nor sd, of Student's t on two degrees no sd."""
    draws = (1, 4000)
    values = {
        "cauchy": rng.standard_cauchy(draws),
        "two": rng.standard_t(2, draws),
        "normal": rng.standard_normal(draws),
    }

    found = diagnose(math.log(2) * (np.abs(values["cauchy"]) > 20), values)

    assert found.verdict == RESAMPLE
    (reason,) = (r for r in found.reasons if "mean and sd" in r)
    assert reason.startswith("No sampling method") and "cauchy" in reason
    assert "two" not in reason
    assert not any("No sampling method" in r and "normal" in r for r in found.reasons)


def test_a_tail_of_two_values_can_be_judged(rng):
    """Nothing can be fitted to it."""
    x = rng.standard_normal((1, 4000))
    heavier = x > np.quantile(x, 0.97)

    found = diagnose(math.log(2) * heavier, {"x": x})

    assert found.khat < 0.5
    assert math.isfinite(found.ess)
    assert found.log_evidence == pytest.approx(math.log(1 + np.mean(heavier)))


def test_tails_of_the_guide_alone_are_not_those_of_the_posterior(rng):
    x = rng.standard_t(2, (1, 4000))

    found = diagnose(stats.norm.logpdf(x) - stats.t.logpdf(x, 2), {"x": x})

    assert found.verdict == RESAMPLE
    assert not any("No sampling method" in reason for reason in found.reasons)


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


# Corner cases of k-hat, through the weights of arrays.


def weights(rng, kind):
    normal = rng.normal(size=4000)
    return {
        "equal": np.zeros(4000),
        "equal and far from zero": np.full(4000, -5000.0),
        "equal in single precision": np.float32(-31.3) + np.float32(1e-4) * normal,
        "equal chains": np.zeros((4, 1000)),
        "equal where they are not zero": np.where(np.arange(4000) < 10, -np.inf, 2.0),
        "a few zero": np.where(np.arange(4000) < 3, -np.inf, 0.1 * normal),
        "half zero": np.where(np.arange(4000) < 2000, -np.inf, 0.1 * normal),
        "two values": np.where(rng.uniform(size=4000) < 0.5, 0.0, 1.0),
        "bounded": np.log(rng.uniform(0.5, 1.0, size=4000)),
        "thin": np.log(rng.beta(2.0, 5.0, size=4000)),
        "light": 0.3 * rng.exponential(size=4000),
        "heavy": 0.9 * rng.exponential(size=4000),
        "a hundred": 0.1 * normal[:100],
        "all but five zero": np.where(np.arange(4000) >= 5, -np.inf, 0.1 * normal),
        "hopeless": 1e150 * normal,
    }[kind]


@pytest.mark.parametrize(
    ("kind", "low", "high", "verdict"),
    [
        ("equal", -math.inf, -math.inf, TRUST),
        ("equal and far from zero", -math.inf, -math.inf, TRUST),
        ("equal in single precision", -math.inf, -math.inf, TRUST),
        ("equal chains", -math.inf, -math.inf, TRUST),
        ("equal where they are not zero", -math.inf, -math.inf, RESAMPLE),
        ("a few zero", -1.0, 0.2, RESAMPLE),
        ("half zero", -1.0, 0.2, RESAMPLE),
        ("two values", -math.inf, -math.inf, RESAMPLE),
        # The tail of a density that ends at its upper limit with a jump has shape -1.
        ("bounded", -1.2, -0.7, RESAMPLE),
        ("thin", -0.5, 0.1, RESAMPLE),
        ("light", 0.1, 0.5, RESAMPLE),
        ("heavy", 0.7, 1.2, DISTRUST),
        ("a hundred", -1.0, 0.5, TRUST),
        ("all but five zero", -math.inf, 1.0, DISTRUST),
        ("hopeless", 1.0, math.inf, DISTRUST),
    ],
)
def test_khat_in_its_corner_cases(rng, kind, low, high, verdict):
    d = diagnose(weights(rng, kind))

    assert low <= d.khat <= high
    assert d.verdict == verdict
    assert math.isfinite(d.log_evidence) and d.ess >= 1 - 1e-9


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_one_weight_that_is_no_number_is_counted(rng, wrong):
    log_w = np.r_[wrong, rng.normal(size=200)]

    with pytest.raises(ValueError, match="1 of 201 log weights are NaN or"):
        diagnose(log_w)


def test_ninety_nine_draws_are_too_few(rng):
    with pytest.raises(ValueError, match="needs >= 100 draws in each chain; got 99"):
        diagnose(rng.normal(size=99))

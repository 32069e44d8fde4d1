"""A verdict tells few draws from a poor guide, and does not hang on the seed of the draws."""

import json
import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from normal_weights import gaussian

import flowvi
from flowvi.diagnostics import VERDICTS, Check, diagnose
from flowvi.fitting.check import diagnose_fresh_draws
from flowvi.guides import FullRank
from flowvi.training.schedule import Schedule

TRUST, RESAMPLE, DISTRUST = VERDICTS
SEEDS = range(20)
CHECK_DRAWS = Schedule().check_draws
# A normal of this scale for the standard one has weights whose tail has the shape 1 - scale^2.
NEAR = math.sqrt(1 - 0.66)


def near_the_limit(seed, draws=4000):
    return gaussian(np.random.default_rng(seed), scale=NEAR, draws=draws, dim=1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_hundred_draws_of_a_good_guide_are_few_and_do_not_speak_against_it(seed):
    d = diagnose(*gaussian(np.random.default_rng(seed), scale=0.8, draws=100))

    assert d.reasons[0].startswith("100 draws are few: draw more, for example fit.draw(4000).")
    assert not any("too poor" in reason for reason in d.reasons)
    assert "heavy-tailed" not in str(d)


def test_a_hundred_draws_are_enough_to_see_a_poor_guide():
    d = diagnose(*gaussian(np.random.default_rng(0), loc=6.0, draws=100))

    assert d.verdict == d.at_best == DISTRUST
    assert "too poor an approximation" in d.reasons[0]


def test_near_a_limit_the_check_decides_and_not_the_seed():
    check = Check(RESAMPLE, 0.66, 16_000)

    alone = [diagnose(*near_the_limit(seed)) for seed in SEEDS]
    held = [diagnose(*near_the_limit(seed), check=check) for seed in SEEDS]

    assert {d.verdict for d in alone} == {RESAMPLE, DISTRUST}
    assert {d.verdict for d in held} == {RESAMPLE}
    for d, other in zip(held, alone, strict=True):
        assert d.at_best == RESAMPLE
        said = any("check by 16000 draws" in reason for reason in d.reasons)
        assert said is (other.verdict == DISTRUST)


def test_the_same_draws_do_not_overrule_a_check_that_says_no():
    good = gaussian(np.random.default_rng(0), scale=1.02)

    d = diagnose(*good, check=Check(DISTRUST, 0.74, 16_000))

    assert diagnose(*good).verdict == TRUST
    assert d.verdict == DISTRUST
    assert "draw more, for example fit.draw(16000)" in d.reasons[0]


def test_more_draws_than_the_check_had_overrule_it():
    good = gaussian(np.random.default_rng(0), scale=1.02)

    d = diagnose(*good, check=Check(DISTRUST, 0.74, 3_000))

    assert d.verdict == TRUST
    assert "these draws are more, so their verdict counts" in d.reasons[0]


def test_draws_that_speak_against_the_check_are_believed():
    bad = gaussian(np.random.default_rng(0), scale=0.4, dim=5)

    d = diagnose(*bad, check=Check(TRUST, 0.2, 16_000))

    assert d.verdict == DISTRUST
    assert any("contradict it" in reason for reason in d.reasons)


def test_few_effective_draws_are_a_want_of_draws_if_the_check_had_enough():
    few = gaussian(np.random.default_rng(0), loc=0.5, draws=700)

    alone, held = diagnose(*few), diagnose(*few, check=Check(RESAMPLE, 0.3, 4_000))

    assert (alone.verdict, held.verdict) == (DISTRUST, RESAMPLE)
    assert any(
        "effective draws" in reason and "fit.draw(4000)" in reason for reason in held.reasons
    )


def test_too_few_draws_to_resample_do_not_speak_against_a_check():
    few = gaussian(np.random.default_rng(1), scale=0.8, draws=100)

    d = diagnose(*few, check=Check(RESAMPLE, 0.3, 4_000))

    assert d.verdict == DISTRUST
    assert "100 draws are few" in d.reasons[0] and "too few to be resampled" in d.reasons[0]
    assert not any("contradict it" in reason for reason in d.reasons)


def test_doubts_leave_no_more_than_resampled_draws():
    d = diagnose(*gaussian(np.random.default_rng(0)), doubts=["Training ended early at 'x'."])

    assert d.verdict == d.at_best == RESAMPLE
    assert d.reasons[0] == "Training ended early at 'x'."


def test_what_is_missed_is_said_before_the_number_of_draws():
    d = diagnose(*gaussian(np.random.default_rng(0), draws=100), missed=["There are other modes."])

    assert d.verdict == DISTRUST
    assert d.reasons[0] == "There are other modes."


# Fits.


def mean(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.fixture(scope="module")
def fitted():
    target = flowvi.from_pyro(mean, torch.tensor([0.4, 1.7, 0.9]))
    return flowvi.fit(target, "fullrank", steps=5, progress=False)


def test_few_draws_of_a_trusted_fit_are_trusted_and_said_to_be_few(fitted, tmp_path):
    again = flowvi.load(fitted.save(tmp_path / "fit"), fitted.target)

    for fit in (fitted, again):
        d = flowvi.diagnose(fit.draw(100))

        assert fit.meta["check"]["verdict"] == d.verdict == TRUST
        assert d.reasons[0].startswith("100 draws are few: draw more, for example fit.draw(4000).")


def test_the_facts_of_a_check_can_be_saved(fitted):
    check = fitted.meta["check"]

    assert json.loads(json.dumps(check)) == check
    assert check["draws"] == CHECK_DRAWS
    assert flowvi.to_inference_data(fitted.draw(100))["posterior"].attrs["verdict"] == TRUST


def test_several_guides_are_checked_together():
    target = flowvi.from_pyro(mean, torch.tensor([0.4, 1.7, 0.9]))

    fit = flowvi.fit(target, "fullrank", steps=2, restarts=2, progress=False)

    assert fit.meta["check"]["draws"] == 2 * CHECK_DRAWS


@pytest.mark.parametrize(("scale", "times"), [(1.0, 1), (0.8, 1), (NEAR, 4), (0.2, 1)])
def test_a_check_takes_more_draws_near_a_limit(scale, times):
    target = flowvi.from_density(lambda v: -(v["x"] ** 2) / 2, {"x": flowvi.Site()})
    guide = FullRank(1).to(target.dtype)
    guide.start(torch.zeros(1, dtype=target.dtype), torch.full((1, 1), scale, dtype=target.dtype))

    assert (
        diagnose_fresh_draws(target, [guide], 0, lambda: False, Schedule()).draws
        == times * CHECK_DRAWS
    )
    assert diagnose_fresh_draws(target, [guide], 0, lambda: True, Schedule()).draws == CHECK_DRAWS


# Densities that are not everywhere.


def scale_of_any_sign(y):
    m = pyro.sample("m", dist.Normal(0.0, 10.0))
    x = pyro.sample("x", dist.Normal(0.7, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(m, x), obs=y)


def rate_of_any_sign(y):
    rate = pyro.sample("rate", dist.Normal(2.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


@pytest.mark.parametrize(
    ("model", "data", "parameter", "latent"),
    [
        (scale_of_any_sign, [1.2, 0.7], "'scale' of the Normal of site 'y' is -", "'x'"),
        (rate_of_any_sign, [1.0, 0.0], "'rate' of the Poisson of site 'y' is -", "'rate'"),
    ],
)
def test_a_parameter_that_leaves_its_constraint_is_named(model, data, parameter, latent):
    target = flowvi.from_pyro(model, torch.tensor(data))
    guide = FullRank(target.dim).to(target.dtype)
    eye = torch.eye(target.dim, dtype=target.dtype)
    guide.start(torch.full((target.dim,), 0.9, dtype=target.dtype), 0.6 * eye)

    d = flowvi.diagnose(flowvi.draws.sampling.draw(target, [guide], 500))

    (reason,) = (r for r in d.reasons if "weight zero" in r)
    assert d.elbo == -math.inf and d.verdict != TRUST
    assert "the ELBO is -inf" in reason
    assert parameter in reason and f"because of {latent}:" in reason


def test_a_wall_of_a_plain_density_is_named_by_the_latent_behind_it():
    def walled(v):
        return torch.where(v["b"] < 1, -(v["a"] ** 2 + v["b"] ** 2) / 2, -torch.inf)

    target = flowvi.from_density(walled, {"a": flowvi.Site(), "b": flowvi.Site()})
    guide = FullRank(2).to(target.dtype)

    d = flowvi.diagnose(flowvi.draws.sampling.draw(target, [guide], 500))

    assert any("moving 'b' alone makes it positive" in reason for reason in d.reasons)


def test_a_training_that_ended_early_is_named(fitted):
    draws = fitted.draw(4000)
    words = "Training of mean ended early: at site 'y'."

    d = flowvi.diagnose(replace(draws, meta={**draws.meta, "failures": [words]}))

    assert flowvi.diagnose(draws).verdict == TRUST
    assert d.verdict == RESAMPLE and words in d.reasons

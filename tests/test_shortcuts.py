"""What a fit leaves out where it would change nothing: evaluations, candidates, checks, pilots."""

import math

import pytest
import torch
from quick import quick

import flowvi
from flowvi.fitting import first_guide, restart
from flowvi.guides import make_guide
from flowvi.initialization import candidates as init
from flowvi.samplers.ais import annealed_importance_sampling
from flowvi.training import stages
from flowvi.training.schedule import Schedule

LOG_Z = 0.5 * math.log(2 * math.pi) * 2


def normal():
    """A standard normal, D = 2, of evidence 2 pi."""
    return flowvi.from_density(lambda v: -0.5 * v["x"].square().sum(), {"x": flowvi.Site((2,))})


def curved():
    return flowvi.from_density(
        lambda v: -0.5 * (v["x"][0] ** 2 + (v["x"][1] - 0.5 * v["x"][0] ** 2) ** 2),
        {"x": flowvi.Site((2,))},
    )


def two_modes():
    return flowvi.from_density(
        lambda v: torch.logaddexp(
            -0.5 * (v["x"] - 6).square().sum(), -0.5 * (v["x"] + 6).square().sum()
        ),
        {"x": flowvi.Site((2,))},
    )


def calls_of(monkeypatch, owner, name):
    """The calls of a function from now on: a list of their arguments."""
    calls, inner = [], getattr(owner, name)

    def counted(*args, **more):
        calls.append(args)
        return inner(*args, **more)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_a_guide_is_evaluated_once_at_the_same_parameters(monkeypatch):
    calls = calls_of(monkeypatch, stages, "evaluate")

    flowvi.fit(curved(), "realnvp", steps=20, compile=False, progress=False)

    # The start once, although it is compared with the last iterate and the average.
    assert len(calls) == 3


@pytest.mark.parametrize(("make", "most"), [(normal, 1), (two_modes, math.inf)])
def test_candidates_of_one_mode_that_cannot_be_better_are_not_refined(monkeypatch, make, most):
    calls = calls_of(monkeypatch, init, "refine_fully")

    found = init.best_gaussian(make(), 0, False, lambda line: None)

    # One of the candidates, and the best once more.
    assert 1 < len(calls) <= 1 + most
    assert len(found.rejected) == len(calls) - 2
    if make is two_modes:
        assert len(calls) > 2


@pytest.mark.parametrize("trusted", [True, False])
def test_a_check_that_ends_the_training_is_not_repeated(monkeypatch, trusted):
    """Where the tail is heavy, the check decides on a small gap, and its result is kept."""
    schedule = {"enough": math.inf, "enough_heavy": -1.0, "enough_beyond": -1.0, "light": -math.inf}
    quick(monkeypatch, steady_steps=20, few_steps=20, least_decay=20, most_stages=2, **schedule)
    checks = calls_of(monkeypatch, restart, "diagnose_fresh_draws")
    if not trusted:
        monkeypatch.setattr(restart.Restart, "trusts", lambda self, candidate: False)

    fit = flowvi.fit(curved(), "realnvp", compile=False, progress=False, escalate=False)

    # A second stage follows only where the check does not trust what the first one made.
    assert len(fit.meta["stages"][0]) == (1 if trusted else 2)
    assert len(checks) == 1


def test_annealing_without_a_pilot_is_cheaper_and_as_good():
    guide = make_guide("fullrank", 2)
    guide.start(torch.full((2,), 0.5), 2 * torch.eye(2))
    values, points = {}, {}
    for pilot in (True, False):
        target, points[pilot] = normal(), 0
        inner = target.log_prob

        def log_prob(z, inner=inner, pilot=pilot):
            points[pilot] += 1
            return inner(z)

        target.log_prob = log_prob
        own = guide.to(target.dtype)
        found = annealed_importance_sampling(
            target, own, 500, power=1.0, temperatures=10, leapfrog=2, pilot=pilot, seed=0
        )
        values[pilot] = found.log_w.exp()

    for weights in values.values():
        error = float(weights.std()) / math.sqrt(len(weights))
        assert float(weights.mean()) == pytest.approx(2 * math.pi, abs=4 * error)
    # Ten rungs of two steps, and eight pilot moves on the first rung alone; and two draws.
    assert points[False] == 2 * 10 + 2 * 8 + 2
    assert points[True] == points[False] + 9 * 2 * 3


def test_a_compilation_is_expected_to_serve_as_many_steps_as_were_taken(monkeypatch):
    expected = []
    monkeypatch.setattr(
        stages.DrawGradient, "consider", lambda self, seconds: expected.append(seconds)
    )
    monkeypatch.setattr(stages.time, "thread_time", iter(range(10**6)).__next__)
    schedule = Schedule(ready=0.0, little=0.0, steady_steps=60, most_stages=1, least_decay=10)

    flowvi.fit(curved(), "realnvp", schedule=schedule, lr=0.01, progress=False, compile=True)

    # A stage is asked after 19 and after 39 steps, and each time the clock is one second later.
    assert expected[:2] == pytest.approx([(19 + 10) / 19, (39 + 10) * 2 / 39])


def test_a_gaussian_that_the_check_trusted_is_not_checked_again(monkeypatch):
    monkeypatch.setattr(first_guide, "needs_no_flow", lambda s, f, trusted: trusted())
    checks = calls_of(monkeypatch, restart, "diagnose_fresh_draws")

    fit = flowvi.fit(normal(), compile=False, progress=False)

    assert fit.meta["guide"] == "fullrank" and not fit.meta["steps"]
    assert len(checks) == 1

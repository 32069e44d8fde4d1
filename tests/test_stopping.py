"""The plateau rule fires on plateaus, not on trends, and a clock keeps its budget."""

import re

import numpy as np
import pytest

from flowvi.runtime.clock import Clock
from flowvi.training.plateau import EVERY, Plateau
from flowvi.training.schedule import Schedule

TRACES = 100
SIGMA = 0.05
MOST = 4000

TRENDS = {
    "linear": lambda t: 2e-4 * t,
    "power law": lambda t: -5 * (t + 1) ** -0.5,
    "falling": lambda t: -2e-4 * t,
}


def normal(rng, t):
    return SIGMA * rng.normal(size=t.shape)


def heteroscedastic(rng, t):
    return SIGMA * (1 + 2 * np.exp(-t / 300)) * rng.normal(size=t.shape)


def student(rng, t):
    return SIGMA * rng.standard_t(2.5, size=t.shape)


NOISES = [normal, heteroscedastic, student]


def fired(trace):
    """Step at which the rule fires; none if it does not."""
    plateau = Plateau()
    return next((i + 1 for i, bound in enumerate(trace) if plateau.add(bound)), None)


def traces(trend, noise, seed=0):
    t = np.arange(MOST)
    return [trend(t) + noise(np.random.default_rng([seed, i]), t) for i in range(TRACES)]


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("trend", TRENDS.values(), ids=TRENDS)
def test_a_trend_is_called_a_plateau_at_most_once_in_a_hundred_traces(trend, noise):
    # Once the power law has slowed to nothing, it is one.
    alarms = [step for trace in traces(trend, noise) if (step := fired(trace[:2000]))]

    assert len(alarms) <= 1


def test_a_steep_fall_is_never_called_a_plateau():
    assert not any(fired(trace) for trace in traces(lambda t: -1e-3 * t, student))


@pytest.mark.parametrize("noise", NOISES)
def test_a_plateau_is_found_within_five_hundred_steps_of_where_the_rule_may_look(noise):
    """The rise ends at step 500, where it has e^-10 of its height left."""
    found = [fired(trace) for trace in traces(lambda t: -2 * np.exp(-t / 50), noise)]

    assert all(found)
    assert np.median(found) <= 700
    assert np.mean(np.array(found) <= 1000) >= 0.85


def test_steps_that_are_not_finite_are_passed_over():
    trace = traces(lambda t: 0.0 * t, normal)[0]
    trace[::7] = np.nan

    assert fired(trace) is not None


def test_a_trace_without_noise_ends_as_soon_as_two_checks_have_seen_it():
    assert fired(np.zeros(MOST)) == 200 + EVERY


def test_a_clock_without_a_budget_never_ends():
    assert not Clock().out_of_time()


def test_a_clock_keeps_its_budget():
    clock = Clock(10.0)
    clock.began -= 6.0

    assert clock.out_of_time(0.5) and not clock.out_of_time()
    assert clock.seconds == pytest.approx(6.0, abs=1.0)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"rates": ()}, "rates must be a tuple of at least one number; got ()"),
        ({"rates": (0.1, -1.0)}, "rates must be a positive number; got -1.0"),
        ({"lengths": (10, 0)}, "lengths must be a whole number of at least 1; got 0"),
        ({"most_stages": 0}, "most_stages must be a whole number of at least 1; got 0"),
        ({"steady_steps": 1.5}, "steady_steps must be a whole number of at least 1; got 1.5"),
    ],
)
def test_schedules_that_cannot_be_are_refused(numbers, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Schedule(**numbers)

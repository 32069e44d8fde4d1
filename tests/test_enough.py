"""Training ends when it is enough: gaps from the noise of steps, and guides that need no steps."""

import math

import numpy as np
import pytest
import torch
from quick import quick

import flowvi
from flowvi.diagnostics import VERDICTS
from flowvi.fitting.enough import is_enough, needs_no_flow
from flowvi.training.noise_gap import noise_gap
from flowvi.training.records import Evaluation
from flowvi.training.schedule import DEFAULT, Schedule


def normal(dim=3):
    scale = torch.linspace(0.5, 2.0, dim)
    return flowvi.from_density(
        lambda v: -0.5 * (v["x"] / scale.to(v["x"])).square().sum(), {"x": flowvi.Site((dim,))}
    )


def correlated():
    """A normal whose KL from the best independent one is 0.5 log(1 / (1 - 0.8^2)) = 0.51."""
    return flowvi.from_density(
        lambda v: -0.5 * (v["x"].square().sum() - 1.6 * v["x"][0] * v["x"][1]) / 0.36,
        {"x": flowvi.Site((2,))},
    )


def curved():
    return flowvi.from_density(
        lambda v: -0.5 * (v["x"][0] ** 2 + (v["x"][1] - 0.5 * v["x"][0] ** 2) ** 2),
        {"x": flowvi.Site((2,))},
    )


@pytest.mark.parametrize("gap", [0.5, 0.01])
@pytest.mark.parametrize("trend", [0.0, 1e-3])
def test_the_noise_of_steps_is_the_gap(gap, trend):
    rng, steps, draws = np.random.default_rng(0), 2000, 64
    weights = rng.normal(-gap, math.sqrt(2 * gap), (steps, draws))
    slow = trend * math.sqrt(gap) * np.arange(steps)

    found = noise_gap((weights.mean(1) + slow).tolist(), draws)

    # The relative standard error of a variance from differences of n values is sqrt(3 / n).
    assert found == pytest.approx(gap, rel=4 * math.sqrt(3 / steps))


def test_bounds_that_are_not_finite_have_no_gap():
    assert noise_gap([1.0, math.inf, 1.0], 64) == math.inf
    assert noise_gap([1.0], 64) == math.inf


@pytest.mark.parametrize(
    ("gap", "khat", "enough"),
    [
        (0.009, 0.4, True),
        (0.011, 0.4, False),
        (0.009, 0.6, False),
        (0.005, 0.6, True),
        (0.005, 0.8, False),
        (0.0009, 0.8, True),
        (0.0009, math.nan, True),
        (0.005, math.nan, False),
        (math.nan, 0.1, False),
    ],
)
def test_a_heavier_tail_needs_a_smaller_gap(gap, khat, enough):
    assert is_enough(DEFAULT, Evaluation(0.0, 0.1, gap, khat)) is enough


@pytest.mark.parametrize(
    ("gap", "khat", "verdict", "needs_none"),
    [
        (0.002, 0.9, VERDICTS[2], True),
        (0.008, 0.3, VERDICTS[0], True),
        (0.008, 0.3, VERDICTS[1], False),
        (0.008, 0.6, VERDICTS[0], False),
        (0.012, 0.3, VERDICTS[0], False),
        (math.nan, 0.3, VERDICTS[0], False),
    ],
)
def test_a_gaussian_is_the_result_if_its_draws_are_trusted(gap, khat, verdict, needs_none):
    trusted = verdict == VERDICTS[0]

    assert needs_no_flow(DEFAULT, Evaluation(0.0, 0.1, gap, khat), lambda: trusted) is needs_none


@pytest.mark.parametrize(("guide", "steps"), [("meanfield", DEFAULT.polish_steps), ("fullrank", 0)])
def test_a_gaussian_by_name_takes_few_steps(guide, steps):
    """None where it is as good as the posterior itself: its start is the best of its kind."""
    fit = flowvi.fit(correlated(), guide, compile=False, progress=False)

    assert fit.meta["steps"] == steps
    assert not any(line.startswith("learning rate") for line in fit.log)
    # The sd of the best independent normal is sqrt(1 - 0.8^2), that of x itself is 1.
    sd = {"meanfield": 0.6, "fullrank": 1.0}[guide]
    draws = fit.draw(4000).values["x"]
    assert draws.std((0, 1)) == pytest.approx([sd, sd], rel=4 / math.sqrt(2 * 4000) + 0.01)


def test_a_flow_on_a_normal_takes_few_steps():
    fit = flowvi.fit(normal(), "realnvp", compile=False, progress=False)

    assert fit.meta["steps"] == DEFAULT.polish_steps


def test_a_gaussian_that_is_not_the_best_is_trained(monkeypatch):
    """Where the first steps bring more than what counts as enough, more follow."""
    numbers = {"steady_steps": 20, "few_steps": 20, "least_decay": 20, "most_stages": 1}
    quick(monkeypatch, **numbers, enough=-1.0, spare=0.0, nothing_left=-1.0)

    fit = flowvi.fit(normal(), "fullrank", compile=False, progress=False)

    assert fit.meta["steps"] > DEFAULT.polish_steps


@pytest.mark.slow
def test_a_stage_ends_its_constant_steps_when_the_gap_is_small():
    numbers = {"steady_steps": 200, "few_steps": 200, "most_stages": 1, "least_decay": 20}
    taken = {}
    for ready in (0.0, 0.1, 1.0):
        schedule = Schedule(ready=ready, nothing_left=0.0, spare=0.0, **numbers)
        fit = flowvi.fit(curved(), "realnvp", schedule=schedule, compile=False, progress=False)
        taken[ready] = fit.meta["steps"]

    # Without the rule all steps and half as many; a warm-up, the steps behind the estimate, and
    # half as many; and steps of falling size alone, where the stage begins with such a gap.
    assert taken[0.0] == 300 and taken[1.0] == 20
    assert 70 + 35 <= taken[0.1] < 300 and taken[0.1] % 15 == 0


def test_a_step_size_that_convinces_is_the_last_one_tried():
    numbers = {"steady_steps": 20, "most_stages": 1, "trial_steps": 20, "least_decay": 20}
    tried = {}
    for share in (0.0, math.inf):
        schedule = Schedule(convincing=share, little=0.0, **numbers)
        fit = flowvi.fit(curved(), "realnvp", schedule=schedule, compile=False, progress=False)
        (line,) = (line for line in fit.log if line.startswith("learning rate"))
        tried[share] = line.split("(")[1].count(":")

    assert tried == {0.0: 1, math.inf: len(DEFAULT.rates)}

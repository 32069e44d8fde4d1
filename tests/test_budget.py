"""A budget is kept whatever a density costs, by a clock that only the density moves."""

import math
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import flowvi
from flowvi.runtime import clock

# Standard normals in the plane, and two of them that lie apart.
APART = torch.tensor([-6.0, 6.0], dtype=torch.float64)


class SlowClock:
    """Time that passes only where a density is evaluated."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def slow(monkeypatch) -> SlowClock:
    ticking = SlowClock()
    monkeypatch.setattr(clock.time, "perf_counter", ticking.perf_counter)
    return ticking


def target(slow: SlowClock, seconds: float, density: Callable[[Tensor], Tensor], dim: int):
    """A density that takes so many seconds a point, and as many for its gradient."""
    made = flowvi.from_density(lambda v: density(v["x"]), {"x": flowvi.Site((dim,))})
    whole = type(made).log_prob

    class Slow(type(made)):  # the class, so that bound methods stay equal
        def log_prob(self, z: Tensor, *rest: object) -> Tensor:
            slow.now += seconds * (z.numel() // dim) * (2 if z.requires_grad else 1)
            return whole(self, z, *rest)

    made.__class__ = Slow
    return made


def funnel(x: Tensor) -> Tensor:
    """Curved, so that a flow has something to do."""
    return -0.5 * (x[0] ** 2 + ((x[1:] - 0.7 * x[0] ** 2) ** 2).sum())


def two(x: Tensor) -> Tensor:
    return torch.logsumexp(-0.5 * (x - APART[:, None]).square().sum(-1), 0)


CASES = {
    "curved": (funnel, 3, 1e-3),
    "curved and slow": (funnel, 8, 5e-3),
    "two modes": (two, 2, 5e-3),
}


@pytest.mark.parametrize(("density", "dim", "seconds"), CASES.values(), ids=CASES)
def test_a_budget_is_kept(slow, density, dim, seconds):
    made = target(slow, seconds, density, dim)
    began, budget = slow.now, 60.0

    fit = flowvi.fit(made, seed=0, budget=budget, compile=False, progress=False)

    a_step = 2 * 64 * seconds
    assert slow.now - began <= 1.1 * budget + a_step, fit.log
    assert math.isfinite(fit.bounds[0])


def test_time_is_that_of_the_system_again():
    assert clock.time.perf_counter is time.perf_counter

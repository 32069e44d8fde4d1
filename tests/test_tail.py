"""The error of the evidence allows for weights so heavy and so rare that no draw has shown them."""

import math

import numpy as np
import pytest

from flowvi.diagnostics import log_evidence, psis
from flowvi.diagnostics.importance import Estimate, with_tail

DRAWS, SETS = 4000, 300


def pareto(k: float) -> list[np.ndarray]:
    """Log weights of mean one with a tail of shape k."""
    rng = np.random.default_rng(0)
    return [np.log((1 - k) * rng.random(DRAWS) ** -k) for _ in range(SETS)]


def covered(sets: list[np.ndarray], errors: float) -> tuple[float, float]:
    """Share of log evidences within so many plain errors of the truth, and so many full ones."""
    plain = [log_evidence(log_w) for log_w in sets]
    full = [with_tail(e, w, psis(w).khat) for e, w in zip(plain, sets, strict=True)]
    return tuple(np.mean([abs(e.value) <= errors * e.se for e in es]) for es in (plain, full))


@pytest.mark.parametrize("k", [0.5, 0.6, 0.7])
def test_the_tail_mends_the_coverage_where_the_variance_is_infinite(k):
    plain, full = covered(pareto(k), 3.0)

    assert 1 - full < (1 - plain) / 2


def test_light_tails_are_left_nearly_as_they_are():
    log_w = np.random.default_rng(1).normal(0, 0.3, DRAWS)
    plain = log_evidence(log_w)

    full = with_tail(plain, log_w, psis(log_w).khat)

    assert plain.se < full.se < 1.1 * plain.se


def test_equal_weights_have_no_tail():
    assert with_tail(Estimate(0.0, 0.0), np.zeros(DRAWS), -math.inf) == Estimate(0.0, 0.0)

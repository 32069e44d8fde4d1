"""Restarts that agree are as near to each other as halves of one; others are told apart."""

import numpy as np

import flowvi
from flowvi.diagnostics import distances, distant_restarts


def chains(shift: float, draws: int = 1000) -> np.ndarray:
    z = np.random.default_rng(0).normal(size=(3, draws, 4))
    z[2, :, 0] += shift
    return z * np.array([1.0, 1e3, 1e-3, 1.0])


def test_equal_restarts_are_within_the_noise():
    found = distances(chains(0.0))

    assert found.matrix.max() < 3 * found.noise
    assert not distant_restarts(found)


def test_a_restart_elsewhere_is_named():
    found = distances(chains(2.0))

    assert found.matrix[0, 2] > 10 * found.noise > found.matrix[0, 1]
    assert np.array_equal(found.matrix, found.matrix.T)
    reason = distant_restarts(found)[0].reason
    assert "Restarts" in reason and "2 are farthest apart" in reason


def test_two_points_are_as_far_as_can_be():
    z = np.zeros((2, 200, 1))
    z[1] = 1.0

    assert distances(z).matrix[0, 1] == 1.0


def test_the_diagnosis_of_restarts_has_their_distances():
    target = flowvi.from_density(lambda v: -0.5 * v["x"].square().sum(), {"x": flowvi.Site((2,))})

    draws = flowvi.fit(target, "fullrank", steps=5, restarts=2, progress=False).draw(500)

    diagnosis = flowvi.diagnose(draws)
    assert len(diagnosis.distances) == 2 and diagnosis.distances[0][0] == 0.0
    assert flowvi.diagnose(flowvi.resample(draws)).distances == diagnosis.distances

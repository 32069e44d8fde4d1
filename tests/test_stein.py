"""Stein's statistics are small for a density's own draws and large for any other's."""

import numpy as np
import pytest
from stein import largest_of_normals, stein_statistics


def exact_draws(draws: int = 2000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws of a correlated normal, their scores, and its precision."""
    precision = np.array([[2.0, -0.8, 0.0], [-0.8, 1.0, 0.3], [0.0, 0.3, 0.5]])
    rng = np.random.default_rng(0)
    u = rng.multivariate_normal(np.ones(3), np.linalg.inv(precision), size=draws)
    return u, -(u - 1.0) @ precision, precision


def test_exact_draws_pass():
    u, score, _ = exact_draws()

    statistics = stein_statistics(u, score)

    assert statistics.shape == (3 + 9,)
    assert np.abs(statistics).max() < largest_of_normals(statistics.size)


@pytest.mark.parametrize(
    ("shift", "scale"), [(0.3, 1.0), (0.0, 1.2)], ids=["wrong mean", "wrong scale"]
)
def test_another_density_is_noticed(shift, scale):
    u, _, precision = exact_draws()
    score = -(u - 1.0 - shift) @ precision / scale**2

    statistics = stein_statistics(u, score)

    assert np.abs(statistics).max() > largest_of_normals(statistics.size)

"""Energy distance between restarts."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np

# Number of points of each restart; the cost is quadratic in it.
POINTS = 400


class Distances(NamedTuple):
    """Pairwise distances of restarts.

    Attributes:
        matrix: Energy coefficient of each pair, (C, C): 0 for equal
            distributions, 1 for two points apart.
        noise: Coefficient between the two halves of a restart, averaged over restarts.
    """

    matrix: np.ndarray
    noise: float


def distances(z: np.ndarray) -> Distances:
    r"""Compare the draws of all pairs of restarts by their energy distance.

    .. math:: H = \frac{2 E|X - Y| - E|X - X'| - E|Y - Y'|}{2 E|X - Y|}

    in coordinates that are standardised over all restarts.

    Args:
        z: Draws, (C, S, D).

    References:
        Szekely and Rizzo (2013), "Energy statistics: A class of statistics
        based on distances", Journal of Statistical Planning and Inference 143.
    """
    scale = z.std((0, 1))
    points = (z - z.mean((0, 1))) / np.where(scale > 0, scale, 1.0)
    points = points[:, np.linspace(0, z.shape[1] - 1, min(2 * POINTS, z.shape[1])).astype(int)]
    halves = [np.array_split(chain, 2) for chain in points]
    matrix = np.zeros((len(z), len(z)))
    for i, j in combinations(range(len(z)), 2):
        matrix[i, j] = matrix[j, i] = _energy(halves[i][0], halves[j][0])
    return Distances(matrix, float(np.mean([_energy(*pair) for pair in halves])))


def _energy(x: np.ndarray, y: np.ndarray) -> float:
    from scipy.spatial.distance import cdist  # slow to import

    between = 2 * cdist(x, y).mean()
    within = cdist(x, x).mean() + cdist(y, y).mean()
    return float(max(between - within, 0.0) / between) if between > 0 else 0.0

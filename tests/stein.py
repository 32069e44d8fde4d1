"""Stein's identities: do draws and the gradient of a log density belong together?"""

import math

import numpy as np
from scipy import stats


def stein_statistics(u: np.ndarray, score: np.ndarray) -> np.ndarray:
    r"""Standardised departures from Stein's identities, each about N(0, 1) when they hold.

    Over exact draws u of a density on R^D with score s,

    .. math:: E[s_i] = 0, \qquad E[(u_i - E u_i) s_j] = -\delta_{ij}.

    Args:
        u: Independent draws, (S, D).
        score: Gradient of the log density at each of them, (S, D).

    Returns:
        One number for each identity, (D + D^2): those of E[s], then those of E[u s], row by row.
    """
    draws, dim = u.shape
    centred = u - u.mean(0)
    products = centred[:, :, None] * score[:, None, :] + np.eye(dim)
    terms = np.concatenate([score, products.reshape(draws, -1)], axis=1)
    return terms.mean(0) / (terms.std(0, ddof=1) / math.sqrt(draws))


def largest_of_normals(count: int, level: float = 1e-4) -> float:
    """Bound on the largest of `count` standard normals in size, exceeded with this probability."""
    return float(stats.norm.isf(level / (2 * count)))

"""Highest-density intervals and Monte Carlo standard errors of columns of draws."""

import math

import numpy as np


def hdi(x: np.ndarray, probability: float) -> tuple[np.ndarray, np.ndarray]:
    """The shortest interval that holds a share of the draws, for each column.

    Args:
        x: Draws, (S, P).
        probability: The share.

    Returns:
        Lower and upper ends, (P) each; NaN for a column with NaN.

    References:
        Chen and Shao (1999), "Monte Carlo estimation of Bayesian credible and HPD intervals",
        Journal of Computational and Graphical Statistics 8(1).
    """
    ordered = np.sort(x, axis=0)
    inside = min(math.floor(probability * len(x)), len(x) - 1)
    with np.errstate(invalid="ignore"):  # differences of infinities
        widths = ordered[inside:] - ordered[: len(x) - inside]
    first = np.argmin(np.where(np.isnan(widths), np.inf, widths), axis=0)
    columns = np.arange(x.shape[1])
    low, high = ordered[first, columns], ordered[first + inside, columns]
    undefined = np.isnan(x).any(0)
    return np.where(undefined, math.nan, low), np.where(undefined, math.nan, high)


def mcse(x: np.ndarray, ess: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Monte Carlo standard errors of the mean and the sd of each column.

    .. math:: \frac{\mathrm{sd}}{\sqrt{\mathrm{ESS}}}, \qquad
              \frac{1}{2\,\mathrm{sd}} \sqrt{\frac{m_4 - m_2^2}{\mathrm{ESS}}}

    with the central moments m of the draws: the second one by the delta method.

    Args:
        x: Draws, (S, P).
        ess: Effective number of draws of each column, (P).
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        squares = (x - x.mean(0)) ** 2
        variance = squares.mean(0)
        spread = (squares**2).mean(0) - variance**2
        error = np.sqrt(np.maximum(spread, 0.0) / ess) / (2 * np.sqrt(variance))
        return np.sqrt(variance / ess), np.where(variance > 0, error, 0.0)

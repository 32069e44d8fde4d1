"""Calibration of predictive intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from flowvi.draws.prediction import Prediction
from flowvi.plots.theme import BLUE, GREY, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVELS = np.linspace(0.05, 0.95, 19)


def coverage(prediction: Prediction, observed: ArrayLike, name: str = "y") -> np.ndarray:
    """Share of observed values inside central predictive intervals of the levels 5, 10 ... 95 %.

    Args:
        prediction: From `flowvi.predict`, of rows of which the outcome is known.
        observed: Their outcomes, (rows).
        name: The site.
    """
    y = np.asarray(observed)
    if y.shape != prediction[name].shape[2:]:
        raise ValueError(
            f"'{name}' was predicted for rows of shape {prediction[name].shape[2:]}; the observed "
            f"values have shape {y.shape}."
        )
    low = prediction.quantiles(name, [*(0.5 - LEVELS / 2)])
    high = prediction.quantiles(name, [*(0.5 + LEVELS / 2)])
    inside = (low <= y) & (y <= high)
    shares: np.ndarray = inside.reshape(len(LEVELS), -1).mean(1)
    return shares


def plot_calibration(prediction: Prediction, observed: ArrayLike, name: str = "y") -> Axes:
    """How often observed values lie inside predictive intervals, against how often they should.

    The band is where 95 % of the shares are, at each level, if the predictions are right and
    rows independent. Below the diagonal the intervals are too narrow. The plot is for
    continuous data: intervals of few classes cannot have every level.

    Args:
        prediction: From `flowvi.predict`, of rows of which the outcome is known.
        observed: Their outcomes, (rows).
        name: The site.

    Returns:
        The axes.
    """
    from scipy import stats  # slow to import

    shares = coverage(prediction, observed, name)
    rows = np.asarray(observed).size
    low, high = (stats.binom.ppf(q, rows, LEVELS) / rows for q in (0.025, 0.975))
    with style():
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(3.6, 3.4), layout="constrained")
        ax.fill_between(LEVELS, low, high, color=GREY, alpha=0.25, lw=0, label="95 % if right")
        ax.plot([0, 1], [0, 1], color=GREY, lw=1)
        ax.plot(LEVELS, shares, "o-", color=BLUE, ms=3, label=f"{rows} rows")
        ax.set(xlabel="level of the interval", ylabel="share of rows inside", xlim=(0, 1))
        ax.set(ylim=(0, 1), title=name)
        ax.legend(loc="upper left")
    return ax

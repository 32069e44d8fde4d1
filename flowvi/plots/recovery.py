"""How an amortised guide recovers true values, over many simulated data sets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flowvi.diagnostics.calibration import LEVEL, Calibration, Recovery
from flowvi.plots.theme import BLUE, GREY, ORANGE, new_axes, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_SCALARS = 6
# Levels of the central intervals.
LEVELS = np.linspace(0.02, 0.98, 49)


def plot_recovery(calibration: Calibration) -> np.ndarray:
    """Means against true values, and z-scores against contraction, for the first six scalars.

    In the upper row each bar is one data set: mean and two standard deviations. In the lower row
    a point on the right says that the data set told much about the value (contraction,
    1 - posterior variance / prior variance), and one far from zero that the mean is off, in
    standard deviations. Extreme values are outside of the picture.

    Args:
        calibration: From `flowvi.sbc` of an amortised guide.

    Returns:
        Axes, (2, scalars).

    References:
        Schad, Betancourt and Vasishth (2021), arXiv:1904.12765.
    """
    found = _recovery(calibration)
    count = min(len(calibration.labels), MAX_SCALARS)
    with style():
        import matplotlib.pyplot as plt

        size = (max(2.1 * count, 4.2), 4.4)
        _, axes = plt.subplots(2, count, figsize=size, squeeze=False, layout="constrained")
        for (top, bottom), i in zip(axes.T, range(count), strict=True):
            truth, mean, sd = found.truth[:, i], found.mean[:, i], found.sd[:, i]
            top.errorbar(
                truth, mean, 2 * sd, fmt=".", ms=2, lw=0.4, color=BLUE, alpha=0.5, rasterized=True
            )
            ends = _ends(truth)
            top.plot(ends, ends, color=GREY, lw=1)
            top.set(title=calibration.labels[i], xlabel="true value", xlim=ends, ylim=ends)
            bottom.plot(found.contraction[:, i], found.z_scores[:, i], ".", ms=3, color=BLUE)
            for z in (-2, 2):
                bottom.axhline(z, color=GREY, lw=0.6, ls=":")
            low = max(float(np.quantile(found.contraction[:, i], 0.02)), -1.0)
            limit = max(4.0, float(np.quantile(np.abs(found.z_scores[:, i]), 0.98)))
            bottom.set(xlabel="contraction", xlim=(min(low, 0.0), 1.02), ylim=(-limit, limit))
        axes[0, 0].set_ylabel("mean, 2 sd")
        axes[1, 0].set_ylabel("z-score")
    return np.asarray(axes)


def plot_coverage(calibration: Calibration) -> Axes:
    """How often central intervals hold the true value, less how often they should.

    One line for each scalar, of plain and of resampled draws. The band is where 99 % of the shares
    are, at each level, if the draws are calibrated. Below it the intervals are too narrow.

    Args:
        calibration: From `flowvi.sbc`.

    Returns:
        The axes.
    """
    from scipy import stats  # slow to import

    fits = len(calibration.plain)
    low, high = (stats.binom.ppf(q, fits, LEVELS) / fits for q in (LEVEL / 2, 1 - LEVEL / 2))
    plain, resampled = calibration.coverage(LEVELS)
    with style():
        ax = new_axes((4.2, 3.2))
        ax.fill_between(LEVELS, low - LEVELS, high - LEVELS, color=GREY, alpha=0.25, lw=0)
        for shares, colour, word in ((plain, BLUE, "plain"), (resampled, ORANGE, "resampled")):
            lines = ax.plot(LEVELS, shares - LEVELS[:, None], color=colour, lw=0.9, alpha=0.8)
            lines[0].set_label(f"{word} draws")
        ax.axhline(0.0, color=GREY, lw=0.6)
        ax.set(xlabel="level of the interval", ylabel="coverage - level", xlim=(0, 1))
        ax.legend(loc="lower left")
    return ax


def plot_held_out(losses: np.ndarray, ax: Axes | None = None) -> Axes:
    """The held-out loss over the steps of a training.

    Args:
        losses: Steps and losses, (looks, 2), such as `AmortizedGuide.losses`.
        ax: Axes to draw on; a new figure without them.
    """
    table = np.asarray(losses, dtype=np.float64).reshape(-1, 2)
    with style():
        ax = ax or new_axes((4.8, 3.0))
        ax.plot(table[:, 0], table[:, 1], "o-", ms=3, color=BLUE)
        ax.set(xlabel="step", ylabel="held-out loss (nats)")
        if len(table) > 3:
            # The first looks do not decide the scale.
            top = float(np.quantile(table[:, 1], 0.9))
            bottom = float(table[:, 1].min())
            ax.set_ylim(bottom - 0.05 * (top - bottom) - 1e-9, top + 0.3 * (top - bottom) + 1e-9)
    return ax


def _ends(truth: np.ndarray) -> tuple[float, float]:
    """Where 96 % of the true values are, with a margin: a prior may have heavy tails."""
    low, high = np.quantile(truth, [0.02, 0.98])
    margin = 0.15 * (high - low) + 1e-12
    return float(low - margin), float(high + margin)


def _recovery(calibration: Calibration) -> Recovery:
    if calibration.recovery is None:
        raise ValueError(
            "plot_recovery needs the calibration of an amortised guide, flowvi.sbc(guide): fits of "
            "each data set do not keep their means."
        )
    return calibration.recovery

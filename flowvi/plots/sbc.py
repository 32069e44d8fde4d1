"""Ranks of simulation-based calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flowvi.diagnostics.calibration import Calibration, uniformity
from flowvi.plots.theme import BLUE, GREY, ORANGE, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_SCALARS = 6


def plot_sbc(calibration: Calibration) -> np.ndarray:
    """Histograms of the ranks, and of P_q(theta < truth), of the six worst scalars.

    The band is where 99 % of the bars of uniform ranks are. Bars high at both
    ends say that the draws are too narrow, a hill that they are too wide, a
    slope that they are shifted. The lower row should be its own mirror image.

    Args:
        calibration: From `flowvi.sbc`.

    Returns:
        Axes, (2, scalars).
    """
    ks, width = uniformity(calibration.plain, calibration.levels)
    shown = np.sort(np.argsort(np.minimum(ks, width))[:MAX_SCALARS])
    with style(mathematics=True):
        import matplotlib.pyplot as plt

        size = (max(2.1 * len(shown), 3.5), 4.2)
        figure, axes = plt.subplots(
            2, len(shown), figsize=size, squeeze=False, layout="constrained"
        )
        for (top, bottom), i in zip(axes.T, shown, strict=True):
            top.set_title(calibration.labels[i])
            _ranks(top, calibration, i)
            _mirror(bottom, calibration.probabilities[:, i])
        axes[0, 0].set_ylabel("fits")
        axes[1, 0].set_ylabel("fits")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return np.asarray(axes)


def _ranks(ax: Axes, calibration: Calibration, i: int) -> None:
    from scipy import stats  # slow to import

    fits, cells = len(calibration.plain), calibration.levels + 1
    bins = int(np.clip(fits // 10, 4, min(20, cells)))
    edges = np.linspace(0, cells, bins + 1).tolist()
    low, high = stats.binom.interval(0.99, fits, 1 / bins)
    ax.axhspan(low, high, color=GREY, alpha=0.25, lw=0, label="99 % of uniform bars")
    ax.hist(calibration.plain[:, i] + 0.5, edges, color=BLUE, alpha=0.75, label="plain draws")
    resampled = calibration.resampled[:, i] + 0.5
    ax.hist(resampled, edges, color=ORANGE, histtype="step", lw=1.3, label="resampled draws")
    ax.set(xlabel="rank", xlim=(0, cells))


def _mirror(ax: Axes, probabilities: np.ndarray) -> None:
    edges = np.linspace(0, 1, 2 * int(np.clip(len(probabilities) // 20, 2, 10)) + 1).tolist()
    ax.hist(probabilities, edges, color=BLUE, alpha=0.75)
    ax.hist(1 - probabilities, edges, color=GREY, histtype="step", lw=1.2)
    ax.set(xlabel=r"$P_q(\theta < \mathrm{truth})$", xlim=(0, 1))

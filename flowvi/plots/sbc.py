"""Ranks of simulation-based calibration.

The band is that of Saeilynoja, Buerkner and Vehtari (2022).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flowvi.diagnostics.calibration import Calibration, ecdf_band, uniformity
from flowvi.plots.theme import BLUE, GREY, ORANGE, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_SCALARS = 6
# Points of an ECDF.
POINTS = 64


def plot_sbc(calibration: Calibration) -> np.ndarray:
    """ECDFs of the ranks less uniform ones, and P_q(theta < truth), of the six worst scalars.

    The band holds the whole line of 99 % of uniform ranks. A line above zero on the
    left and below on the right says that the draws are too narrow, the reverse that they are too
    wide, a single hill or valley that they are shifted. The lower row should be its own
    mirror image.

    Args:
        calibration: From `flowvi.sbc`.

    Returns:
        Axes, (2, scalars).
    """
    ks, width = uniformity(calibration.plain, calibration.levels)
    shown = np.sort(np.argsort(np.minimum(ks, width))[:MAX_SCALARS])
    with style(mathematics=True):
        import matplotlib.pyplot as plt

        size = (max(2.1 * len(shown), 5.2), 4.2)
        figure, axes = plt.subplots(
            2, len(shown), figsize=size, squeeze=False, layout="constrained"
        )
        for (top, bottom), i in zip(axes.T, shown, strict=True):
            top.set_title(calibration.labels[i])
            _difference(top, calibration, i)
            _mirror(bottom, calibration.probabilities[:, i])
        axes[0, 0].set_ylabel("ECDF - uniform")
        axes[1, 0].set_ylabel("fits")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return np.asarray(axes)


def _difference(ax: Axes, calibration: Calibration, i: int) -> None:
    fits, levels = len(calibration.plain), calibration.levels + 1
    count = min(levels, POINTS)
    cells = np.unique(np.linspace(0, levels, count + 1).round().astype(int))[1:-1] / levels
    low, high = ecdf_band(fits, cells)
    ends = np.concatenate([[0.0], cells, [1.0]])
    lower, upper = (np.concatenate([[0.0], side - cells, [0.0]]) for side in (low, high))
    ax.fill_between(ends, lower, upper, color=GREY, alpha=0.25, lw=0, label="99 % of uniform ranks")
    for ranks, colour, word in (
        (calibration.plain, BLUE, "plain draws"),
        (calibration.resampled, ORANGE, "resampled draws"),
    ):
        share = (ranks[:, i, None] < cells * levels - 0.5).mean(0)
        ax.plot(ends, np.concatenate([[0.0], share - cells, [0.0]]), color=colour, label=word)
    ax.axhline(0.0, color=GREY, lw=0.6)
    ax.set(xlabel="rank / L", xlim=(0, 1))


def _mirror(ax: Axes, probabilities: np.ndarray) -> None:
    edges = np.linspace(0, 1, 2 * int(np.clip(len(probabilities) // 20, 2, 10)) + 1).tolist()
    ax.hist(probabilities, edges, color=BLUE, alpha=0.75)
    ax.hist(1 - probabilities, edges, color=GREY, histtype="step", lw=1.2)
    ax.set(xlabel=r"$P_q(\theta < \mathrm{truth})$", xlim=(0, 1))

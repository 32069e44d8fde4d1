"""Sensitivity to prior and likelihood."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flowvi.diagnostics.power_scaling import Sensitivity
from flowvi.plots.theme import BLUE, GREY, ORANGE, new_axes, style
from flowvi.runtime.arguments import check_type

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 24


def plot_sensitivity(found: Sensitivity, ax: Axes | None = None) -> Axes:
    """Dots for the sensitivity of each scalar to the prior and to the likelihood.

    Right of the line at 0.05 a scalar is sensitive. If only the dot of the prior is there, the
    prior dominates; if both are, prior and data disagree.

    Args:
        found: From `flowvi.sensitivity`; the 24 scalars that depend most on the prior are shown.
        ax: Axes to draw on; a new figure without them.
    """
    check_type("found", found, Sensitivity, "what flowvi.sensitivity(draws) returned")
    order = np.argsort(-found.prior, kind="stable")[:MOST][::-1]
    places = np.arange(len(order))
    with style():
        ax = ax or new_axes((5.6, 0.26 * max(len(order), 3) + 1.0))
        ax.hlines(places, 0, np.maximum(found.prior, found.likelihood)[order], color=GREY, lw=0.6)
        ax.plot(found.likelihood[order], places, "o", color=BLUE, ms=4.5, label="likelihood")
        ax.plot(found.prior[order], places, "o", color=ORANGE, ms=4.5, label="prior")
        ax.axvline(found.limit, color=GREY, lw=1.0, ls=":")
        ax.set_yticks(places, [found.labels[i] for i in order])
        ax.set(xlabel="sensitivity to the power", xlim=(0, None))
        ax.set_ylim(-0.7, max(len(order), 1) - 0.3)
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderaxespad=0.2)
    return ax

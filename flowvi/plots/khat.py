"""The tail of the importance weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from flowvi.diagnostics import as_chains, khat_threshold, log_evidence, psis
from flowvi.draws.diagnose import as_weights
from flowvi.draws.draws import Draws, weights_of
from flowvi.plots.theme import BLUE, GREY, ORANGE, new_axes, style
from flowvi.runtime.arguments import refuse_fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_khat(draws: Draws | ArrayLike, ax: Axes | None = None) -> Axes:
    """The largest weights, and the generalised Pareto tail that is fitted to them.

    Of draws with rows, the k-hat of each row, in order of size.

    Args:
        draws: Draws of a fit, not resampled, or an array of log weights.
        ax: Axes to draw on; a new figure without them.
    """
    refuse_fit("plot_khat", draws)
    if isinstance(draws, Draws) and draws.by_row:
        return _of_rows(draws, ax)
    given = weights_of("plot_khat", draws) if isinstance(draws, Draws) else as_weights(draws)
    log_w = as_chains(given).ravel()
    smooth, khat = psis(log_w)
    threshold = khat_threshold(len(log_w))
    order = np.argsort(log_w)[::-1][: np.isfinite(log_w).sum()]
    rank = np.arange(1, len(order) + 1)
    tail = slice(math.ceil(min(len(log_w) / 5, 3 * math.sqrt(len(log_w)))))
    raw = log_w[order] - log_evidence(log_w).value
    # Smoothing does not change the smallest weight, which thus relates the two scales.
    fitted = smooth[order] - smooth[order[-1]] + raw[-1]
    good = khat < threshold
    with style():
        ax = ax or new_axes((4.8, 3.6))
        ax.loglog(rank, np.exp(raw), ".", ms=3, color=GREY, label="weights")
        ax.loglog(
            rank[tail],
            np.exp(fitted[tail]),
            color=BLUE if good else ORANGE,
            lw=1.6,
            label="generalised Pareto tail",
        )
        ax.axhline(1, color=GREY, lw=0.6, ls=":")
        ax.set_ylim(max(np.exp(raw[-1]), 1e-4) / 2, 2 * np.exp(raw[0]))
        word = "below" if good else "not below"
        ax.set_title(f"Pareto k-hat {khat:.2f}, {word} {threshold:.2f}")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(lambda *_: "")
        ax.set(xlabel="rank of the draw", ylabel="weight / mean weight")
        ax.legend(loc="lower left")
    return ax


def _of_rows(draws: Draws, ax: Axes | None) -> Axes:
    weights_of("plot_khat", draws)
    khat = np.sort(np.clip(draws.khat, -1.0, 2.0))[::-1]
    threshold = khat_threshold(len(draws))
    above = khat >= threshold
    with style():
        ax = ax or new_axes((4.8, 3.6))
        rank = np.arange(1, len(khat) + 1)
        ax.plot(rank[~above], khat[~above], ".", ms=3, color=BLUE)
        ax.plot(rank[above], khat[above], ".", ms=4, color=ORANGE)
        ax.axhline(threshold, color=GREY, lw=0.7, ls=":")
        ax.set_title(f"Pareto k-hat: {above.sum()} of {len(khat)} rows not below {threshold:.2f}")
        ax.set(xlabel="rank of the row", ylabel="k-hat of its weights")
    return ax

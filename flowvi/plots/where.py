"""Where the heaviest weights lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from flowvi.diagnostics import Where
from flowvi.diagnostics.moments import blocks
from flowvi.draws.diagnose import axes_of, named_values, where
from flowvi.draws.draws import Draws
from flowvi.plots.theme import GREY, ORANGE, new_axes, style
from flowvi.runtime.arguments import refuse_fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST = 120.0  # area of the heaviest draw's mark, in points


def plot_where(draws: Draws, ax: Axes | None = None) -> Axes:
    """All draws, and the heaviest of them, in the two scalars in which they are most displaced.

    Args:
        draws: Draws of a fit, not resampled, with at least two scalars.
        ax: Axes to draw on; a new figure without them.
    """
    if isinstance(draws, Where):
        raise TypeError(
            "plot_where takes the draws themselves: plot_where(draws), not where(draws)."
        )
    refuse_fit("plot_where", draws)
    found = where(draws)
    if draws.by_row:
        raise ValueError(
            "plot_where shows draws that have one weight each, and draws with rows have one for "
            f"each row: where(draws) names the rows, the first of them in {found.labels[0]}."
        )
    if len(found.labels) < 2:
        raise ValueError("plot_where needs draws of at least two scalars; see where(draws).")
    log_w = draws.log_weights.ravel()
    columns = {
        name + index: x[..., i].ravel()
        for name, indices, x in blocks(named_values(draws), axes_of(draws))
        for i, index in enumerate(indices)
    }
    first, second = pair_of(found.labels, columns)
    x, y = columns[first], columns[second]
    top = np.argsort(log_w)[-found.heaviest :]
    size = LARGEST * np.exp(log_w[top] - log_w.max())
    with style():
        ax = ax or new_axes((4.8, 3.6))
        ax.plot(x, y, ".", ms=2, color=GREY, alpha=0.4, label="draws of the guide")
        ax.scatter(x[top], y[top], s=size, color=ORANGE, alpha=0.6, lw=0, label="heaviest weights")
        ax.set(xlabel=first, ylabel=second)
        ax.set_title(f"{found.share:.0%} of the weight on {found.heaviest} draws")
        ax.legend(loc="best")
    return ax


def pair_of(labels: Sequence[str], columns: Mapping[str, np.ndarray]) -> tuple[str, str]:
    """The first scalar, and the next one that is no function of it, such as its logarithm."""
    first = labels[0]
    order = np.argsort(columns[first], kind="stable")
    for label in labels[1:]:
        steps = np.diff(columns[label][order])
        if (steps < 0).any() and (steps > 0).any():
            return first, label
    return first, labels[1]

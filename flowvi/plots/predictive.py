"""Data that the posterior predicts, beside the data that were observed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from flowvi.plots.theme import BLUE, ORANGE, new_axes, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS, MOST_LINES, BINS = 60, 40, 30
# Bars of counts, and draws behind their intervals.
MOST_BARS, MOST_DRAWS = 40, 400
INNER, OUTER = (0.25, 0.75), (0.05, 0.95)


def plot_predictive(
    observed: ArrayLike,
    predicted: ArrayLike,
    labels: Sequence[Any] | None = None,
    name: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Intervals of each observation and the observation itself; histograms where there are many.

    Counts have a bar for each number.

    Args:
        observed: The data, (*rows).
        predicted: Simulated data, (draws, *rows), (chain, draw, *rows) too.
        labels: What to call the observations.
        name: What to call the site.
        ax: Axes to draw on; a new figure without them.

    Raises:
        ValueError: The shapes do not fit, or there is nothing to show.
    """
    y = np.asarray(observed, dtype=np.float64)
    shape = np.shape(predicted)
    if not y.size or not np.size(predicted) or shape[len(shape) - y.ndim :] != y.shape:
        raise ValueError(
            f"predicted must end in the shape {y.shape} of the data, and hold some; got {shape}."
        )
    x = np.asarray(predicted, dtype=np.float64).reshape(-1, y.size)
    y = y.ravel()
    with style():
        wide = min(max(0.24 * y.size, 4.8), 7.2) if y.size <= MOST_ROWS else 4.8
        ax = ax or new_axes((wide, 3.4))
        if y.size <= MOST_ROWS:
            _intervals(ax, y, x, labels)
            ax.set_ylabel(name)
        else:
            seen = y[np.isfinite(y)]
            draw = _bars if _is_whole(x) and _is_whole(seen) else _histograms
            draw(ax, seen, x)
            ax.set_xlabel(name)
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.2)
    return ax


def _intervals(ax: Axes, y: np.ndarray, x: np.ndarray, labels: Sequence[Any] | None) -> None:
    places = np.arange(len(y))
    for quantiles, width, word in ((OUTER, 1.6, "90 %"), (INNER, 5.0, "50 %")):
        low, high = np.quantile(x, quantiles, axis=0)
        ax.vlines(places, low, high, color=BLUE, lw=width, alpha=0.45, label=f"{word} predicted")
    ax.plot(places, y, "o", color=ORANGE, ms=4.5, mec="white", mew=0.6, label="observed")
    if labels is not None and len(labels) == len(y) <= 30:
        texts = [str(label) for label in labels]
        steep = max(map(len, texts)) > 3
        ax.set_xticks(places, texts, rotation=60 if steep else 0, ha="right" if steep else "center")
    ax.set_xlim(-0.7, len(y) - 0.3)


def _is_whole(x: np.ndarray) -> bool:
    return bool(np.isfinite(x).all() and (x == np.floor(x)).all())


def _bars(ax: Axes, y: np.ndarray, x: np.ndarray) -> None:
    """Shares of counts: bars of the observed ones, intervals of the predicted ones."""
    low = min(y.min(), np.quantile(x, 0.002))
    high = max(y.max(), np.quantile(x, 0.998))
    # Bars of several counts each, where there are many.
    width = max(1, math.ceil((high - low + 1) / MOST_BARS))
    edges = np.arange(low, high + width + 1, width) - 0.5
    middle = edges[:-1] + width / 2
    seen = np.histogram(y, edges)[0] / len(y)
    shares = np.stack([np.histogram(row, edges)[0] / len(y) for row in x[:MOST_DRAWS]])
    ax.bar(middle, seen, 0.8 * width, color=ORANGE, alpha=0.75, label="observed")
    for quantiles, line, word in ((OUTER, 1.6, "90 %"), (INNER, 4.0, "50 %")):
        ends = np.quantile(shares, quantiles, axis=0)
        ax.vlines(middle, *ends, color=BLUE, lw=line, alpha=0.6, label=f"{word} predicted")
    ax.set(xlim=(edges[0] - 0.2, edges[-1] + 0.2), ylim=(0, None), ylabel="share")
    ax.locator_params(axis="x", integer=True)


def _histograms(ax: Axes, y: np.ndarray, x: np.ndarray) -> None:
    low, high = np.quantile(np.concatenate([x[:MOST_LINES].ravel(), y]), (0.002, 0.998))
    edges = np.linspace(low, high if high > low else low + 1.0, BINS + 1)
    for i, row in enumerate(x[:MOST_LINES]):
        heights, _ = np.histogram(row, edges, density=True)
        label = "predicted" if i == 0 else None
        ax.stairs(heights, edges, color=BLUE, lw=0.6, alpha=0.35, label=label)
    heights, _ = np.histogram(y, edges, density=True)
    ax.stairs(heights, edges, color=ORANGE, lw=1.8, label="observed")
    ax.set(yticks=[], xlim=(edges[0], edges[-1]), ylim=(0, None))

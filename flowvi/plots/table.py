"""Pictures of tables: each column of simulated rows beside the observed ones, and pairs of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from flowvi.plots.theme import BLUE, GREY, ORANGE, new_axes, style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# Columns in a picture, levels of a category, and characters of a name.
MOST_COLUMNS, MOST_LEVELS, LONGEST = 24, 12, 14
WIDE, BINS, MOST_BARS = 3, 24, 25


def plot_columns(observed: pd.DataFrame, simulated: pd.DataFrame, fig: Any = None) -> Axes:
    """Distributions of the columns of two tables: bars of one, lines or dots of the other.

    Args:
        observed: A table; at most 24 of its columns are shown.
        simulated: A table with the same columns.
        fig: A matplotlib figure to draw on; a new one without it.

    Returns:
        The axes of the first column.
    """
    import matplotlib.pyplot as plt

    names = list(observed.columns)[:MOST_COLUMNS]
    _check_columns(observed, simulated)
    wide = min(WIDE, len(names))
    tall = math.ceil(len(names) / wide)
    with style():
        size = (max(1.9 * wide, 3.0), 1.6 * tall + 0.3)
        fig = fig or plt.figure(figsize=size, layout="constrained")
        axes = fig.subplots(tall, wide, squeeze=False).ravel()
        for ax, name in zip(axes, names, strict=False):
            _column(ax, str(name), observed[name], simulated[name])
        for ax in axes[len(names) :]:
            ax.set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside upper left", ncols=2)
    found: Axes = axes[0]
    return found


def plot_associations(
    observed: pd.DataFrame, simulated: pd.DataFrame, ax: Axes | None = None
) -> Axes:
    """Rank correlations of all pairs of columns, of one table against another.

    Each level of a category is a column of 0 and 1. Bars are two standard errors of an observed
    correlation, :math:`(1 - r^2) / \\sqrt{n}`.

    Args:
        observed: A table.
        simulated: A table with the same columns.
        ax: Axes to draw on; a new figure without them.
    """
    _check_columns(observed, simulated)
    seen, new = _correlations(observed, simulated)
    with style():
        ax = ax or new_axes((4.4, 4.2))
        ax.plot([-1, 1], [-1, 1], color=GREY, lw=0.8)
        error = 2 * (1 - seen**2) / math.sqrt(len(observed))
        ax.errorbar(seen, new, xerr=error, fmt="o", ms=3.5, color=BLUE, lw=0.6, alpha=0.7)
        most = min(1.0, float(np.abs(np.concatenate([seen, new])).max(initial=0.1)) * 1.15)
        ax.set(xlim=(-most, most), ylim=(-most, most))
        ax.set(xlabel="rank correlation, observed", ylabel="rank correlation, simulated")
        ax.set_aspect("equal")
    return ax


def _check_columns(observed: pd.DataFrame, simulated: pd.DataFrame) -> None:
    if list(observed.columns) != list(simulated.columns) or not len(observed.columns):
        raise ValueError(
            "Both tables need the same columns, at least one; got "
            f"{list(observed.columns)} and {list(simulated.columns)}."
        )


def _column(ax: Axes, name: str, seen: Any, new: Any) -> None:
    ax.set_title(_short(name))
    if seen.dtype.kind not in "iuf" or set(np.unique(np.asarray(seen))) <= {0, 1}:
        _levels(ax, seen, new)
    elif seen.dtype.kind in "iu":
        _counts(ax, np.asarray(seen), np.asarray(new))
    else:
        _floats(ax, np.asarray(seen, float), np.asarray(new, float))
    ax.set(yticks=[], ylim=(0, None))


def _levels(ax: Axes, seen: Any, new: Any) -> None:
    shares = [column.value_counts(normalize=True) for column in (seen, new)]
    levels = [*dict.fromkeys([*sorted(shares[0].index, key=str), *shares[1].index])]
    if len(levels) > MOST_LEVELS:
        levels = sorted(levels, key=lambda v: -shares[0].get(v, 0.0))[:MOST_LEVELS]
    places = np.arange(len(levels))
    heights = [[share.get(level, 0.0) for level in levels] for share in shares]
    _bars(ax, places, heights, 0.7)
    texts = [_short(str(level)) for level in levels]
    steep = sum(map(len, texts)) > 16
    ax.set_xticks(places, texts, rotation=40 if steep else 0, ha="right" if steep else "center")
    ax.set_xlim(-0.7, len(levels) - 0.3)


def _counts(ax: Axes, seen: np.ndarray, new: np.ndarray) -> None:
    low = min(seen.min(), int(np.quantile(new, 0.002)))
    high = max(seen.max(), int(np.quantile(new, 0.998)))
    width = max(1, math.ceil((high - low + 1) / MOST_BARS))
    edges = np.arange(low, high + width + 1, width) - 0.5
    heights = [np.histogram(x, edges)[0] / len(x) for x in (seen, new)]
    _bars(ax, edges[:-1] + width / 2, heights, 0.8 * width)
    ax.locator_params(axis="x", integer=True, nbins=5)


def _bars(ax: Axes, places: np.ndarray, heights: Any, width: float) -> None:
    ax.bar(places, heights[0], width, color=ORANGE, alpha=0.75, label="observed")
    ax.plot(places, heights[1], "o", color=BLUE, ms=4, label="simulated")


def _floats(ax: Axes, seen: np.ndarray, new: np.ndarray) -> None:
    low, high = np.quantile(np.concatenate([seen, new]), (0.002, 0.998))
    edges = np.linspace(low, high if high > low else low + 1.0, BINS + 1)
    heights = [np.histogram(x, edges, density=True)[0] for x in (seen, new)]
    ax.stairs(heights[0], edges, color=ORANGE, fill=True, alpha=0.75, label="observed")
    ax.stairs(heights[1], edges, color=BLUE, lw=1.6, label="simulated")
    ax.set_xlim(edges[0], edges[-1])
    ax.locator_params(axis="x", nbins=4)


def _correlations(observed: pd.DataFrame, simulated: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Rank correlations of columns that vary in both tables; not of levels of one category."""
    columns: list[tuple[int, np.ndarray, np.ndarray]] = []
    for i, name in enumerate(observed.columns):
        seen, new = observed[name], simulated[name]
        if seen.dtype.kind in "iufb":
            pairs = [(seen, new)]
        else:
            pairs = [(seen == level, new == level) for level in sorted(set(seen), key=str)]
            pairs = pairs[: 1 if len(pairs) == 2 else None]
        ranked = [tuple(c.rank().to_numpy(float) for c in pair) for pair in pairs]
        columns += [(i, a, b) for a, b in ranked if a.std() > 0 and b.std() > 0]
    both: list[tuple[float, float]] = []
    for k, (i, a, b) in enumerate(columns):
        for j, c, d in columns[:k]:
            if i != j:
                both.append((float(np.corrcoef(a, c)[0, 1]), float(np.corrcoef(b, d)[0, 1])))
    found = np.array(both).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"

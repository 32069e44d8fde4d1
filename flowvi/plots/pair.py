"""Marginals and pairs of scalars."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from flowvi.draws.draws import EXPECTED, Draws
from flowvi.draws.scalars import elements
from flowvi.plots.theme import BLUE, style
from flowvi.runtime.arguments import check_type, refuse_fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEFAULT_SCALARS, MAX_SCALARS = 6, 12


def plot_pair(draws: Draws, names: Sequence[str] | None = None) -> np.ndarray:
    """Marginals on the diagonal, pairs of scalars below it.

    Args:
        draws: Draws of a fit, plain or resampled.
        names: What to show: values ("theta") or elements ("theta[3]", or by
            its label, "theta[London]"). Without names, the model's scalars,
            then the first elements of its vectors, six in all.

    Returns:
        Axes, (scalars, scalars); those above the diagonal are switched off.
    """
    refuse_fit("plot_pair", draws)
    check_type("draws", draws, Draws, EXPECTED)
    columns = scalars(draws, names)
    labels, size = list(columns), len(columns)
    with style():
        import matplotlib.pyplot as plt

        side = max(1.5 * size, 3.0)
        figure, axes = plt.subplots(
            size, size, figsize=(side, side), squeeze=False, layout="constrained"
        )
        for i, row in enumerate(labels):
            for j, column in enumerate(labels):
                ax = axes[i, j]
                if j > i:
                    ax.set_axis_off()
                    continue
                if i == j:
                    _marginal(ax, columns[row])
                else:
                    _joint(ax, columns[column], columns[row])
                ax.set_xlabel(column if i == size - 1 else "")
                ax.set_ylabel(row if j == 0 < i else "")
                ax.tick_params(labelbottom=i == size - 1, labelleft=j == 0 < i)
        figure.suptitle(draws.title, fontsize=9)
    return np.asarray(axes)


def scalars(
    draws: Draws, names: Sequence[str] | None = None, most: int = DEFAULT_SCALARS
) -> dict[str, np.ndarray]:
    """Columns to show, by label; without names the model's scalars first, `most` in all."""
    if names is None:
        scalars_first = sorted(draws.values, key=lambda name: draws[name].ndim > 2)
        every = (element for name in scalars_first for element in elements(draws, name))
        varying = ((label, x) for _, label, x in every if np.isfinite(x).all() and np.ptp(x) > 0)
        return dict(itertools.islice(varying, most))
    columns: dict[str, np.ndarray] = {}
    for name in names:
        value = name if name in draws.values else name.partition("[")[0]
        found = {
            label: x for index, label, x in elements(draws, value) if name in (value, index, label)
        }
        if not found:
            raise KeyError(f"'{value}' has shape {draws[value].shape[2:]}; it has no '{name}'.")
        columns |= found
    if len(columns) > MAX_SCALARS:
        raise ValueError(
            f"The names stand for {len(columns)} scalars; a pair plot shows {MAX_SCALARS} at most. "
            "Name some elements, for example 'theta[0]'."
        )
    return columns


def _marginal(ax: Axes, x: np.ndarray) -> None:
    low, high = _limits(x)
    ax.hist(x, bins=40, range=(low, high), color=BLUE, alpha=0.75, density=True)
    ax.set(xlim=(low, high), yticks=[])
    ax.spines["left"].set_visible(False)
    ax.locator_params(axis="x", nbins=3)


def _joint(ax: Axes, x: np.ndarray, y: np.ndarray) -> None:
    extent = (*_limits(x), *_limits(y))
    inside = (x >= extent[0]) & (x <= extent[1]) & (y >= extent[2]) & (y <= extent[3])
    ax.hexbin(
        x[inside], y[inside], gridsize=28, extent=extent, cmap="Blues", mincnt=1, lw=0.1, bins="log"
    )
    ax.set(xlim=extent[:2], ylim=extent[2:])
    ax.locator_params(nbins=3)


def _limits(x: np.ndarray) -> tuple[float, float]:
    """The central 99 % and a little more, but nothing that no draw reaches."""
    low, high = np.quantile(x, (0.005, 0.995))
    margin = 0.05 * (high - low) or 1.0
    return max(float(low - margin), float(x.min())), min(float(high + margin), float(x.max()))

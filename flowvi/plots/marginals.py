"""Marginals of several tables of draws on top of each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from flowvi.draws.draws import Draws
from flowvi.plots.pair import MAX_SCALARS, scalars
from flowvi.plots.theme import BLUE, GREY, ORANGE, style
from flowvi.runtime.arguments import check_type, refuse_fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 32
COLOURS = (GREY, BLUE, ORANGE, "#4d8f5b")


def plot_marginals(
    sets: Draws | Mapping[str, Draws],
    names: Sequence[str] | None = None,
    columns: int = 3,
    focus: str = "",
) -> np.ndarray:
    """Outlines of histograms, one panel for each scalar.

    Args:
        sets: Draws; or several by what to call them, such as the Gaussian start, the flow and the
            resampled ones; four at most.
        names: What to show, as in `plot_pair`; three rows of scalars without.
        columns: Panels side by side.
        focus: The set whose draws, and as much to each side, are shown; all draws by default.

    Returns:
        Axes, (rows, columns); those of empty panels are switched off.
    """
    refuse_fit("plot_marginals", sets)
    if isinstance(sets, Draws):
        sets = {"draws": sets}
    check_type("sets", sets, Mapping, "the draws of a fit, or a dictionary of such draws by name")
    if not 1 <= len(sets) <= len(COLOURS):
        raise ValueError(
            f"plot_marginals shows 1 to {len(COLOURS)} sets of draws; got {len(sets)}."
        )
    last = list(sets.values())[-1]
    labels = list(scalars(last, names, min(3 * columns, MAX_SCALARS)))
    shown = {name: scalars(draws, labels) for name, draws in sets.items()}
    across = min(columns, len(labels))
    down = -(-len(labels) // across)
    with style():
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(
            down,
            across,
            # The legend is above all panels, and needs its width also with a single panel.
            figsize=(max(2.4 * across, 1.5 * len(sets)), 1.75 * down + 0.3),
            squeeze=False,
            layout="constrained",
        )
        for ax in axes.flat[len(labels) :]:
            ax.set_axis_off()
        for ax, label in zip(axes.flat, labels, strict=False):
            _panel(ax, label, {name: found[label] for name, found in shown.items()}, focus)
        if len(sets) > 1:
            found = axes[0, 0].get_legend_handles_labels()
            figure.legend(*found, loc="outside upper left", ncols=len(sets))
    return np.asarray(axes)


def _panel(ax: Axes, label: str, columns: Mapping[str, np.ndarray], focus: str) -> None:
    ends = {n: np.quantile(x[np.isfinite(x)], (0.003, 0.997)) for n, x in columns.items()}
    low, high = min(e[0] for e in ends.values()), max(e[1] for e in ends.values())
    if focus:
        near, far = ends[focus]
        low, high = max(low, near - (far - near)), min(high, far + (far - near))
    edges = np.linspace(low, high if high > low else low + 1.0, BINS + 1)
    for (name, x), colour in zip(columns.items(), COLOURS, strict=False):
        last = name == list(columns)[-1]
        # Draws beyond the panel count too.
        heights = np.histogram(x, edges)[0] / (len(x) * np.diff(edges))
        ax.stairs(heights, edges, color=colour, lw=1.4, label=name, fill=False)
        if last:
            ax.stairs(heights, edges, color=colour, alpha=0.15, fill=True)
    ax.set(yticks=[], xlim=(edges[0], edges[-1]), ylim=(0, None))
    ax.spines["left"].set_visible(False)
    ax.set_title(label)
    ax.locator_params(axis="x", nbins=4)

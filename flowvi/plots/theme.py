"""The look of the plots, local to each figure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#2b6a99", "#d1742f", "#7f8790"
STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": "#2d3238",
    "text.color": "#2d3238",
    "xtick.color": "#555c64",
    "ytick.color": "#555c64",
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "figure.dpi": 120.0,
    "savefig.dpi": 160.0,
}


@contextmanager
def style(mathematics: bool = False) -> Iterator[None]:
    """Inside the block, matplotlib has the style of these plots.

    Args:
        mathematics: Whether dollar signs mark formulas; in names of the user's they do not.
    """
    import matplotlib as mpl

    with mpl.rc_context({**STYLE, "text.parse_math": mathematics}):
        yield


def new_axes(size: tuple[float, float]) -> Axes:
    """Axes of a new figure."""
    import matplotlib.pyplot as plt

    _, ax = plt.subplots(figsize=size, layout="constrained")
    return ax

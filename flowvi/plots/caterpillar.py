"""Intervals of many units, sorted by their means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from flowvi.draws.draws import EXPECTED, Draws
from flowvi.plots.theme import BLUE, GREY, ORANGE, new_axes, style
from flowvi.runtime.arguments import check_type, refuse_fit, unknown_choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Largest numbers of units that are drawn, of flagged ones among them, and of those with a label.
MOST_UNITS, MOST_FLAGGED, LABELLED = 300, 100, 60


def plot_caterpillar(draws: Draws, site: str | None = None) -> Axes:
    """Means of units in rising order, with intervals of 50 % and 90 %.

    Of over 300 units those are drawn that are evenly spaced in this order. Units whose conditional
    does not fit are orange, and drawn first of all.

    Args:
        draws: Draws of a fit, plain or resampled.
        site: A value with an element for each unit; by default the first one, in the plate of
            units if the fit is structured. An element of a value that has several for each unit
            is named by its place, as in "slopes[1]".

    Raises:
        KeyError: There is no value of this name.
        ValueError: The value has no axis.
    """
    refuse_fit("plot_caterpillar", draws)
    check_type("draws", draws, Draws, EXPECTED)
    plate = "" if draws.units is None else draws.units.plate
    name, part = _chosen(draws, site, plate)
    values = _values(draws, name, part, plate)
    label = name if part is None else f"{name}[{part}]"
    flagged = np.zeros(values.shape[1], bool)
    if draws.units is not None and len(draws.units.bad) == len(flagged):
        flagged = draws.units.bad
    mean = values.mean(0)
    shown = _shown(mean, flagged)
    low, left, right, high = np.quantile(values[:, shown], (0.05, 0.25, 0.75, 0.95), axis=0)
    place = np.arange(len(shown))
    with style():
        ax = new_axes((6.4, 3.4))
        for some, colour, text in (
            (~flagged[shown], BLUE, f"{(~flagged).sum():,} units"),
            (flagged[shown], ORANGE, f"{flagged.sum():,} not to be trusted"),
        ):
            if not some.any():
                continue
            ax.vlines(place[some], low[some], high[some], color=colour, lw=0.6, alpha=0.7)
            ax.vlines(place[some], left[some], right[some], color=colour, lw=2.0, alpha=0.7)
            ax.plot(place[some], mean[shown][some], ".", color=colour, ms=4.0, label=text)
        ax.axhline(mean.mean(), color=GREY, lw=0.7, ls=":")
        ax.set(ylabel=label, title=_title(len(flagged), len(shown), plate))
        if len(shown) <= LABELLED:
            axis = _unit_axis(draws, name, plate)
            words = draws.coords.get(draws.dims.get(name, ("",))[axis] or "", range(len(flagged)))
            ax.set_xticks(place, [str(words[i]) for i in shown], rotation=90, fontsize=6.5)
        else:
            ax.set_xticks([])
        if flagged.any():
            ax.legend(loc="upper left")
    return ax


def unit_values(draws: Draws) -> list[str]:
    """Names of the values that have an element for each unit of a structured fit."""
    if draws.units is None:
        return []
    return [name for name in draws.values if draws.units.plate in draws.dims.get(name, ())]


def _chosen(draws: Draws, site: str | None, plate: str) -> tuple[str, str | None]:
    """The value to draw, and the place of its element within a unit."""
    if site is None:
        vectors = [name for name, value in draws.values.items() if value.ndim > 2]
        found = unit_values(draws) or vectors
        if not found:
            raise ValueError("plot_caterpillar needs a vector, and got draws of numbers alone.")
        name, part = found[0], None
    elif site in draws.values:
        name, part = site, None
    else:
        name, _, part = site.partition("[")
        part = part.rstrip("]")
        if name not in draws.values:
            raise KeyError(unknown_choice("value", site, draws.values))
    value = draws[name]
    if value.ndim < 3:
        raise ValueError(f"plot_caterpillar needs a vector, and got '{name}', which is a number.")
    if value.ndim > 3 and part is None:
        part = ", ".join("0" for _ in value.shape[3:])
    return name, part


def _values(draws: Draws, name: str, part: str | None, plate: str) -> np.ndarray:
    """Draws of one number for each unit, (draw, unit)."""
    value: np.ndarray = np.moveaxis(draws[name], 2 + _unit_axis(draws, name, plate), 2)
    if part is not None:
        try:
            place: Any = tuple(int(i) for i in part.split(","))
            value = value[(..., *place)]
        except (ValueError, IndexError):
            raise KeyError(
                f"'{name}' has shape {value.shape[3:]} for each unit; it has no '[{part}]'."
            ) from None
    if value.ndim != 3:
        raise KeyError(f"'{name}' has shape {value.shape[3:]} for each unit; name one place.")
    found: np.ndarray = value.reshape(-1, value.shape[2])
    return found


def _unit_axis(draws: Draws, name: str, plate: str) -> int:
    """The axis of units among the axes of a value."""
    dims = list(draws.dims.get(name, ()))
    return dims.index(plate) if plate in dims else 0


def _shown(mean: np.ndarray, flagged: np.ndarray) -> np.ndarray:
    """Units to draw, by their means in rising order."""
    order = np.argsort(mean, kind="stable")
    if len(order) <= MOST_UNITS:
        return order
    doubtful = order[flagged[order]]
    doubtful = doubtful[_even(len(doubtful), MOST_FLAGGED)]
    rest = order[~flagged[order]]
    kept = {*doubtful, *rest[_even(len(rest), MOST_UNITS - len(doubtful))]}
    return np.array([unit for unit in order if unit in kept])


def _even(count: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, max(count - 1, 0), min(count, most)).round().astype(int))


def _title(count: int, shown: int, plate: str) -> str:
    what = f"units of {plate}" if plate else "elements"
    few = f", {shown} of them drawn" if shown < count else ""
    return f"{count:,} {what}{few}: mean, 50 % and 90 %"

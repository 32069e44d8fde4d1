"""The bound over a fit's steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from flowvi.fitting.result import Fit, RowFit
from flowvi.plots.theme import BLUE, GREY, new_axes, style
from flowvi.runtime.arguments import check_type

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 400  # points of a smoothed curve


def plot_loss(history: Mapping[str, ArrayLike] | Fit, ax: Axes | None = None) -> Axes:
    """The bound over the steps: its running median, and the band of single steps.

    The scale is linear within the noise at the end and logarithmic beyond, so
    that both the first steps and the last digits can be read.

    Args:
        history: A fit; or ``bound``, one number a step, NaN where a step was skipped;
            optionally ``stage``, a name for every step.
        ax: Axes to draw on; a new figure without them.
    """
    history = _bound_and_stage(history)
    bound = np.asarray(history["bound"], dtype=np.float64)
    steps = np.flatnonzero(np.isfinite(bound))
    if not len(steps):
        raise ValueError("history['bound'] holds no finite value: there is nothing to plot.")
    finite = bound[steps]
    at, low, middle, high = _running_quantiles(finite)
    end = finite[-max(1, len(finite) // 5) :]
    level = float(np.median(end))
    noise = max(float(np.subtract(*np.quantile(end, (0.9, 0.1)))), 1e-6 * abs(level), 1e-12)

    with style():
        ax = ax or new_axes((6.4, 3.6))
        ax.set_yscale(
            "function",
            functions=(
                lambda y: np.arcsinh((y - level) / noise),
                lambda t: level + noise * np.sinh(t),
            ),
        )
        ax.fill_between(steps[at], low, high, color=BLUE, alpha=0.2, lw=0, label="80 % of steps")
        ax.plot(steps[at], middle, color=BLUE, lw=1.4, label="running median")
        # The first 2 % of the steps do not affect the scale: a bad start can have extreme bounds.
        bottom = min(float(middle[len(middle) // 50 :].min()), level - 2 * noise)
        top = max(float(high.max()), level + noise / 2)
        ticks = _ticks(level, noise, bottom, top)
        ax.set_yticks(ticks, [_number(tick, level, noise) for tick in ticks])
        ax.set(
            xlim=(0, len(bound)),
            ylim=(bottom, top),
            xlabel="step",
            ylabel="bound (nats, asinh scale)",
        )
        if "stage" in history:
            _mark_stages(ax, np.asarray(history["stage"]).astype(str).tolist())
        ax.legend(loc="lower right")
    return ax


def _bound_and_stage(source: Any) -> Mapping[str, ArrayLike]:
    """The bound of every step, and its stage where there is one."""
    if isinstance(source, RowFit):
        raise TypeError("A fit of rows has a bound for every epoch: plot_epochs(fit.history).")
    if isinstance(source, Fit) and "stage" in source.history:
        names = stage_names(source.history, source.meta["stages"])
        return {"bound": source.history["bound"], "stage": names}
    columns = source.history if isinstance(source, Fit) else source
    check_type("history", columns, Mapping, "a fit, or its history, fit.history")
    if "bound" not in columns:
        raise ValueError(f"history has no column 'bound'; it has {', '.join(columns) or 'none'}.")
    return dict(columns)


def stage_names(history: Mapping[str, ArrayLike], stages: Sequence[Sequence[str]]) -> np.ndarray:
    """A name for every step of a fit: its stage, or its restart where there are several.

    Args:
        history: ``restart`` and ``stage`` of every step.
        stages: Names of the stages of each restart.
    """
    restarts = np.asarray(history["restart"]).astype(int)
    places = np.asarray(history["stage"]).astype(int)
    many = len(stages) > 1
    return np.array(
        [
            f"restart {r}" if many or not stages else stages[r][s]
            for r, s in zip(restarts, places, strict=True)
        ]
    )


def _running_quantiles(y: np.ndarray) -> tuple[np.ndarray, ...]:
    """Positions (P), and the 10, 50 and 90 % quantiles of y around each."""
    half = max(3, len(y) // 100)
    at = np.unique(np.linspace(0, len(y) - 1, SHOWN).astype(int))
    windows = (y[max(0, i - half) : i + half + 1] for i in at)
    low, middle, high = np.transpose([np.quantile(w, (0.1, 0.5, 0.9)) for w in windows])
    return at, low, middle, high


def _ticks(level: float, noise: float, bottom: float, top: float) -> list[float]:
    """The final level, and distances of 1, 2, 5, 10 ... from it, well apart on the scale."""
    unit = 10 ** (math.floor(math.log10(noise)) - 1)
    steps = [unit * m * 10.0**e for e in range(40) for m in (1, 2, 5)]
    gap = (math.asinh((top - level) / noise) - math.asinh((bottom - level) / noise)) / 9
    ticks = [level]
    for sign, limit in ((-1, level - bottom), (1, top - level)):
        last = 0.0
        for step in steps:
            place = math.asinh(step / noise)
            if step <= limit and place - last >= gap:
                ticks.append(level + sign * step)
                last = place
    return sorted(ticks)


def _number(tick: float, level: float, noise: float) -> str:
    """A tick's label, as fine as its distance from the level asks for."""
    distance = max(abs(tick - level), noise)
    return f"{tick:.{min(max(math.ceil(-math.log10(distance)) + 1, 0), 6)}f}"


def _mark_stages(ax: Axes, stages: list[str]) -> None:
    """A line where each stage begins, and its name where there is room."""
    starts = [i for i, stage in enumerate(stages) if i == 0 or stage != stages[i - 1]]
    for start, end in zip(starts, [*starts[1:], len(stages)], strict=True):
        if start:
            ax.axvline(start, color=GREY, lw=0.7, ls=":")
        if end - start > len(stages) / 12:
            where = ax.get_xaxis_transform()
            ax.text(start, 1.0, f" {stages[start]}", transform=where, va="bottom", size=8)

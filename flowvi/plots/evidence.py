"""The ladder of bounds on the log evidence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from flowvi.diagnostics import Evidence
from flowvi.plots.theme import BLUE, GREY, ORANGE, new_axes, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_evidence(evidence: Evidence, ax: Axes | None = None) -> Axes:
    """ELBO <= L_10 <= ... <= log evidence <= EUBO, each with two standard errors.

    Args:
        evidence: From `flowvi.evidence`.
        ax: Axes to draw on; a new figure without them.
    """
    rungs = _rungs(evidence)
    names = [name for name, *_ in rungs]
    with style(mathematics=True):
        ax = ax or new_axes((6.0, 0.6 + 0.34 * len(rungs)))
        for place, (_, value, se, marker, colour) in enumerate(rungs):
            error = 0.0 if math.isnan(se) else 2 * se
            ax.errorbar(value, place, xerr=error, fmt=marker, color=colour, ms=6, capsize=3, lw=1.3)
        ax.axvline(evidence.log_evidence, color=GREY, lw=0.7, ls=":")
        ax.set_yticks(np.arange(len(rungs)), names)
        ax.set_ylim(len(rungs) - 0.5, -0.5)
        ax.set_xlabel("nats")
        ax.ticklabel_format(axis="x", useOffset=False)
        ax.locator_params(axis="x", nbins=6)
        judged = "can be relied on" if evidence.reliable else "do not rely on it"
        ax.set_title(f"Log evidence {evidence.log_evidence:.3f}: {judged}")
    return ax


def _rungs(e: Evidence) -> list[tuple[str, float, float, str, str]]:
    """Name, value, standard error, marker and colour; the bounds point where the evidence is."""
    good = BLUE if e.reliable else ORANGE
    rungs = [
        ("ELBO" if b.particles == 1 else f"$L_{{{b.particles}}}$", b.bound, b.se, ">", BLUE)
        for b in e.bounds
    ]
    rungs += [
        ("debiased", e.debiased, e.debiased_se, "o", good),
        ("smoothed", e.smoothed, e.smoothed_se, "o", good),
        ("log mean weight", e.mean_weight, e.mean_weight_se, "o", good),
        ("bridge", e.bridge, e.bridge_se, "o", BLUE),
        ("EUBO", e.eubo, e.eubo_se, "<", BLUE),
        ("95 % certain", e.certain_parts, math.nan, ">", GREY),
    ]
    return [rung for rung in rungs if math.isfinite(rung[1])]

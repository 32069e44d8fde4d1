"""Detect scalars whose mean or standard deviation no number of draws can estimate."""

from collections.abc import Mapping

import numpy as np

from flowvi.diagnostics.finding import TRUST, Finding
from flowvi.diagnostics.findings import MIN_ESS, MIN_ESS_SD, exceeds_tolerance
from flowvi.diagnostics.importance import khat_threshold, psis
from flowvi.diagnostics.moments import Axes, Comparison, blocks

# Largest number of scalars that are tested, the least certain first, and that are named.
LOOKED_AT, NAMED = 50, 3


def heavy(
    c: Comparison, log_w: np.ndarray, values: Mapping[str, np.ndarray], axes: Axes | None
) -> list[Finding]:
    """Find scalars that fail the verdict because of the tails of their own distribution.

    The mean of |x - median|, or of its square, can be estimated if the Pareto shape of its tail
    is below the limit for weights (Vehtari et al. 2024, JMLR 25(72)). If neither plain nor weighted
    draws satisfy this, no guide can estimate the mean, or the sd, and neither can MCMC.

    Args:
        c: Comparison of plain and reweighted draws.
        log_w: Log weights, (chain, draw).
        values: Arrays (chain, draw, ...) by name.
        axes: Labels of their elements.
    """
    known = np.minimum(c.ess_mean / MIN_ESS, c.ess_sd / MIN_ESS_SD)
    blamed = np.logical_or(*exceeds_tolerance(c)) | (known < 1)
    worst = [i for i in np.argsort(known, kind="stable") if blamed[i]][:LOOKED_AT]
    shapes = _shapes({c.labels[i] for i in worst}, log_w.ravel(), values, axes)
    without_mean = {label: k for label, (k, _) in shapes.items() if k >= 0}
    without_sd = {label: k for label, (_, k) in shapes.items() if label not in without_mean}
    found = []
    for what, which in (("mean and sd", without_mean), ("sd", without_sd)):
        if which:
            found.append(Finding(TRUST, _sentence(what, which)))
    return found


def _shapes(
    wanted: set[str], log_w: np.ndarray, values: Mapping[str, np.ndarray], axes: Axes | None
) -> dict[str, tuple[float, float]]:
    """Pareto shapes of distance and squared distance that exceed the limit; -1 otherwise."""
    found = {}
    for name, indices, x in blocks(values, axes):
        for i, index in enumerate(indices):
            label = name + index
            # A scalar and its equal unconstrained coordinate count once.
            if label not in wanted or label.removeprefix("unconstrained ") in found:
                continue
            column = x[..., i].ravel()
            with np.errstate(divide="ignore"):
                distance = np.log(np.abs(column - np.median(column)))
            limit = khat_threshold(len(column))
            shapes = [
                min(psis(power * distance).khat, psis(log_w + power * distance).khat)
                for power in (1, 2)
            ]
            if max(shapes) >= limit:
                mean, sd = (k if k >= limit else -1.0 for k in shapes)
                found[label] = (mean, sd)
    return found


def _sentence(what: str, shapes: Mapping[str, float]) -> str:
    ordered = sorted(shapes.items(), key=lambda item: -item[1])
    named = ", ".join(f"{label} ({khat:.1f})" for label, khat in ordered[:NAMED])
    others = len(shapes) - NAMED
    more = f" and {others} other{'s' * (others > 1)}" if others > 0 else ""
    return (
        f"No sampling method can estimate the {what} of {named}{more}: the tails are too heavy "
        "(Pareto shapes in brackets). Use the quantiles."
    )

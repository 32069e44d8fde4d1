"""Where in the space of parameters the weights are bad, and for which of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from flowvi.diagnostics.importance import as_chains, psis
from flowvi.diagnostics.moments import Axes, blocks
from flowvi.diagnostics.pareto import tail_size

# Standard errors by which the heaviest draws have to be off the middle of a scalar.
CLEARLY = 5.0
SHOWN = 5


@dataclass(frozen=True, eq=False)
class Where:
    """The heaviest weights, scalar by scalar; one entry per scalar, (P).

    Attributes:
        labels: Names of the scalars, such as ``theta[3]``, those displaced most first.
        khat: Pareto shape for the mean and sd of each: of the tails of w |x - m| and
            w (x - m)^2, the larger. Averages of the scalar converge if it is below the
            threshold, even where the evidence does not.
        displacement: How far the heaviest draws lie from the middle of all, in
            standard errors of their mean rank; below zero at low values.
        median: Median of the scalar among the heaviest draws.
        level: Share of all draws below that median.
        heaviest: Number of draws that count as the heaviest.
        share: Share of the total weight that they carry.
    """

    labels: tuple[str, ...]
    khat: np.ndarray
    displacement: np.ndarray
    median: np.ndarray
    level: np.ndarray
    heaviest: int
    share: float

    def __str__(self) -> str:
        head = f"The {self.heaviest} heaviest draws carry {self.share:.0%} of the weight"
        rows = [f"{'':<24}{'k-hat':>7}{'median of the heaviest':>25}{'draws below':>13}"]
        for i in range(min(SHOWN, len(self.labels))):
            rows.append(
                f"{self.labels[i]:<24}{self.khat[i]:>7.2f}{self.median[i]:>25.4g}"
                f"{self.level[i]:>13.1%}"
            )
        return "\n".join([head, *rows])

    @property
    def sentence(self) -> str:
        """Where the heaviest draws lie; empty if they lie nowhere in particular."""
        if not self.labels or not abs(self.displacement[0]) > CLEARLY:
            return ""
        low = self.displacement[0] < 0
        part = self.level[0] if low else 1 - self.level[0]
        side, end = ("below", "lowest") if low else ("above", "highest")
        return (
            f"The heaviest weights are at the {'low' if low else 'high'} end of {self.labels[0]}: "
            f"half of them {side} {self.median[0]:.3g}, in the guide's {end} {part:.1%}."
        )


def where(
    log_weights: ArrayLike, values: Mapping[str, np.ndarray], axes: Axes | None = None
) -> Where:
    """Say where the heaviest weights are, and how heavy they are for each scalar.

    Args:
        log_weights: log p - log q of draws of the guide, (draw) or (chain, draw).
        values: Arrays (chain, draw, ...) by name.
        axes: Labels of their elements.

    References:
        Vehtari et al. (2024), "Pareto smoothed importance sampling", JMLR 25(72),
        section 3.3: k-hat for a function of the draws.
    """
    chains = as_chains(log_weights)
    log_w = chains.ravel()
    weights = np.exp(log_w - log_w.max())
    heaviest = tail_size(len(log_w))
    top = np.argsort(log_w)[-heaviest:]
    labels, columns = [], []
    for name, indices, x in blocks(values, axes):
        flat = x.reshape(len(log_w), -1)
        for index, column in zip(indices, flat.T, strict=True):
            if np.isfinite(column).all() and np.ptp(column) > 0:
                labels.append(name + index)
                columns.append(_facts(column, log_w, weights, top))
    table = np.array(columns).reshape(-1, 4)
    order = np.argsort(-np.abs(table[:, 1]), kind="stable")
    khat, displacement, median, level = table[order].T
    return Where(
        tuple(labels[i] for i in order),
        khat,
        displacement,
        median,
        level,
        heaviest,
        float(weights[top].sum() / weights.sum()),
    )


def _facts(
    x: np.ndarray, log_w: np.ndarray, weights: np.ndarray, top: np.ndarray
) -> tuple[float, float, float, float]:
    """k-hat, displacement, median of the heaviest draws and the share of draws below it."""
    mean = np.average(x, weights=weights)
    with np.errstate(divide="ignore"):
        distance = np.log(np.abs(x - mean))
    khat = max(psis(log_w + power * distance).khat for power in (1, 2))
    ranks = np.empty(len(x))
    ranks[np.argsort(x, kind="stable")] = (np.arange(len(x)) + 0.5) / len(x)
    # The mean of n uniform ranks has standard deviation 1 / sqrt(12 n).
    displacement = (ranks[top].mean() - 0.5) * math.sqrt(12 * len(top))
    median = float(np.median(x[top]))
    return khat, displacement, median, float((x < median).mean())

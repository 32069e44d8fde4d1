"""Locate the heaviest weights in the space of parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from flowvi.diagnostics.importance import check_weights, psis_of_rows
from flowvi.diagnostics.moments import Axes, blocks
from flowvi.diagnostics.pareto import tail_size
from flowvi.runtime.display import Printed

# Least displacement of the heaviest draws, in standard errors, that is reported.
CLEARLY = 5.0
SHOWN = 5


@dataclass(frozen=True, eq=False, repr=False)
class Where(Printed):
    """Location of the heaviest weights for each scalar; one entry per scalar, (P).

    Attributes:
        labels: Names of the scalars, such as ``theta[3]``, in order of displacement.
        khat: Pareto shape for the mean and sd of each scalar: the larger of those of
            w |x - m| and w (x - m)^2. Averages of the scalar converge if it is below the
            threshold, even if the evidence does not.
        displacement: Mean rank of the heaviest draws relative to the middle, in standard
            errors; negative at low values.
        median: Median of the scalar among the heaviest draws.
        level: Share of all draws below this median.
        heaviest: Number of the heaviest draws; with a row axis, of each row.
        share: Share of the total weight of the heaviest draws; the mean over rows.
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
        """Sentence on the location of the heaviest draws; empty without a clear location."""
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
    """Locate the heaviest weights, and estimate k-hat for each scalar.

    Args:
        log_weights: log p - log q of draws of the guide, (draw) or (chain, draw), or for each
            row, (chain, draw, row).
        values: Arrays (chain, draw, [row,] ...) by name.
        axes: Labels of their elements.

    References:
        Vehtari et al. (2024), "Pareto smoothed importance sampling", JMLR 25(72),
        section 3.3: k-hat for a function of the draws.
    """
    log_w = np.atleast_2d(np.asarray(log_weights, dtype=np.float64))
    check_weights(log_w)
    rows = log_w.ndim > 2
    log_w = log_w.reshape(log_w.shape[0] * log_w.shape[1], -1)
    heaviest, seen = tail_size(len(log_w)), np.isfinite(log_w.max(0))
    weights = np.exp(log_w - np.where(seen, log_w.max(0), 0.0))
    top = np.argsort(log_w, axis=0)[-heaviest:]
    labels: list[str] = []
    found = [np.empty((4, 0))]
    for name, array in values.items():
        first = 0
        for _, indices, x in blocks({name: array}, axes):
            flat = x.reshape(len(log_w), -1)
            # Elements of one row are adjacent.
            each = int(np.prod(array.shape[3:]))
            row = (
                (first + np.arange(flat.shape[1])) // each if rows else np.zeros(flat.shape[1], int)
            )
            first += flat.shape[1]
            kept = np.isfinite(flat).all(0) & seen[row]
            kept[kept] = np.ptp(flat[:, kept], axis=0) > 0
            labels += [name + index for index, good in zip(indices, kept, strict=True) if good]
            row = row[kept]
            found.append(_facts(flat[:, kept], log_w[:, row], weights[:, row], top[:, row]))
    table = np.concatenate(found, axis=1)
    order = np.argsort(-np.abs(table[1]), kind="stable")
    khat, displacement, median, level = table[:, order]
    share = np.take_along_axis(weights, top, 0)[:, seen].sum(0) / weights[:, seen].sum(0)
    return Where(
        tuple(labels[i] for i in order),
        khat,
        displacement,
        median,
        level,
        heaviest,
        float(share.mean()),
    )


def _facts(x: np.ndarray, log_w: np.ndarray, weights: np.ndarray, top: np.ndarray) -> np.ndarray:
    """k-hat, displacement, median of the heaviest draws and the share below it, (4, P).

    Args:
        x: Scalars, (S, P).
        log_w: Log weights of each scalar, (S, P).
        weights: The weights, up to a factor, (S, P).
        top: Indices of the heaviest draws, (M, P).
    """
    draws, heaviest = len(x), len(top)
    mean = (x * weights).sum(0) / weights.sum(0)
    with np.errstate(divide="ignore"):
        distance = np.log(np.abs(x - mean))
    khat = np.maximum(*(psis_of_rows((log_w + power * distance).T).khat for power in (1, 2)))
    ranks = np.empty(x.shape)
    places = np.arange(draws)[:, None] + 0.5
    np.put_along_axis(ranks, np.argsort(x, axis=0, kind="stable"), places / draws, 0)
    # The mean of n uniform ranks has standard deviation 1 / sqrt(12 n).
    middle = np.take_along_axis(ranks, top, 0).mean(0) - 0.5
    median = np.median(np.take_along_axis(x, top, 0), axis=0)
    level = (x < median).mean(0)
    return np.stack([khat, middle * math.sqrt(12 * heaviest), median, level])

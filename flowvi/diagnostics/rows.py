"""What is said of each row of draws that have weights for each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from flowvi.diagnostics.finding import VERDICTS
from flowvi.diagnostics.importance import (
    MOST_KHAT,
    Estimate,
    khat_error,
    khat_threshold,
    log_evidence,
    with_tail,
)

# Rows that a sentence or a table names.
NAMED = 10
# Chance that an estimate is off by two standard errors, to one side.
CHANCE = 0.0228
# Share of rows that may fail by no more than the errors of their numbers.
TOLERATED = 0.05
# Standard deviations of a normal distribution between its middle and its upper 5 %.
UPPER = 1.645


@dataclass(frozen=True, eq=False)
class Rows:
    """A verdict and its numbers for each row, (R) each.

    Attributes:
        labels: What to call the rows: their coordinates, or their places in the data.
        verdict: What `diagnose` says of the draws of the row alone.
        at_best: The same if two standard errors of its numbers speak for the draws.
        khat: Pareto shape of the weights' tail.
        ess: Effective number of draws.
        elbo, elbo_se: Evidence lower bound.
        log_evidence, log_evidence_se: Log of the mean weight, plus half its squared error,
            which is the leading bias of a logarithm.
        draws: Number of draws of a row.
    """

    labels: tuple[str, ...]
    verdict: np.ndarray
    at_best: np.ndarray
    khat: np.ndarray
    ess: np.ndarray
    elbo: np.ndarray
    elbo_se: np.ndarray
    log_evidence: np.ndarray
    log_evidence_se: np.ndarray
    draws: int

    def __len__(self) -> int:
        return len(self.labels)

    def worst(self, n: int = NAMED) -> np.ndarray:
        """Places of the rows that are trusted least, the worst first."""
        rank = np.array([VERDICTS.index(v) for v in self.verdict])
        return np.lexsort((self.ess, -self.khat, -rank))[:n]

    def __str__(self) -> str:
        width = max(3, *(len(self.labels[i]) for i in self.worst()))
        head = f"  {'row':<{width}} {'k-hat':>6} {'effective':>9} {'log evidence':>20}    verdict"
        lines = [head]
        for i in self.worst():
            value = f"{self.log_evidence[i]:.3f} +- {self.log_evidence_se[i]:.2g}"
            lines.append(
                f"  {self.labels[i]:<{width}} {self.khat[i]:>6.2f} {self.ess[i]:>9.0f} "
                f"{value:>20}    {self.verdict[i]}"
            )
        return "\n".join(lines)


def named(labels: Sequence[str], chosen: np.ndarray, badness: np.ndarray, what: str) -> str:
    """Such as: 3 of 500 rows are not to be trusted: 17, 33, 240.

    Args:
        labels: Of all rows.
        chosen: Which of them are meant, (R); of more than ten the worst are named.
        badness: How bad each row is, (R).
        what: What is said of them.
    """
    places = np.flatnonzero(chosen)
    worst = places[np.argsort(-badness[places], kind="stable")][:NAMED]
    words = ", ".join(labels[i] for i in np.sort(worst)) + (", ..." if len(places) > NAMED else ".")
    return (
        f"{len(places)} of {len(labels)} rows {'is' if len(places) == 1 else 'are'} {what}: {words}"
    )


def surely(khat: np.ndarray, draws: int) -> np.ndarray:
    """Whether k-hats are too large by more than noise explains, (R).

    A k-hat is if it is above 0.7 by more than its errors, or above the limit for so many draws
    and away from the middle of all rows by more than their spread. Two standard errors are
    allowed for one row, and for R rows as many as keep the chance that any of them is off.

    Args:
        khat: Of each row, (R).
        draws: Number of draws of a row.
    """
    errors = -float(ndtri(CHANCE / len(khat)))
    slack = np.array([khat_error(k, draws) if math.isfinite(k) else 0.0 for k in khat])
    # The error of a k-hat grows like 1 + k: on a logarithmic scale all have the same.
    scale = np.log1p(np.clip(khat, -0.5, 2.0))
    middle, high = np.quantile(scale, (0.5, 1 - TOLERATED))
    spread = max((high - middle) / UPPER, khat_error(0.0, draws))
    apart = (khat >= khat_threshold(draws)) & (scale - middle >= errors * spread)
    found: np.ndarray = (khat - errors * slack >= MOST_KHAT) | apart
    return found


def too_many(failed: np.ndarray, sure: np.ndarray) -> bool:
    """Whether rows that fail, (R), are more than noise explains: any surely, or over 5 %."""
    return bool((failed & sure).any() or failed.sum() > TOLERATED * len(failed))


def evidence_of_each(log_w: np.ndarray, khat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log evidence of each row and its error, without the leading bias. (R, S), (R) -> (R), (R).

    A logarithm of a mean with variance v, relative to its square, is v / 2 too low on average:
    little for a row, and not for the sum over many.
    """
    plain = [log_evidence(row) for row in log_w]
    full = [with_tail(e, row, k) for e, row, k in zip(plain, log_w, khat, strict=True)]
    values = np.array([e.value + e.se**2 / 2 for e in plain])
    return values, np.array([e.se for e in full])


def total(values: np.ndarray, errors: np.ndarray) -> Estimate:
    """The sum over rows, whose draws are independent, with its standard error."""
    return Estimate(float(values.sum()), float(np.sqrt((errors**2).sum())))

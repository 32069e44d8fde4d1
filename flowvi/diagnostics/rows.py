"""Verdicts and numbers for draws with weights for each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from flowvi.diagnostics.finding import VERDICTS
from flowvi.diagnostics.importance import (
    MOST_KHAT,
    Estimate,
    khat_error,
    khat_threshold,
    log_evidence,
    with_tail,
)
from flowvi.runtime.display import Printed

# Largest number of rows named in a sentence or a table.
NAMED = 10
# One-sided probability of an error above two standard errors.
CHANCE = 0.0228
# Share of rows that may fail within the errors of their numbers.
TOLERATED = 0.05
# The 95 % quantile of the standard normal distribution.
UPPER = 1.645


@dataclass(frozen=True, eq=False, repr=False)
class Rows(Printed):
    """A verdict and its numbers for each row, (R) each.

    Attributes:
        labels: Labels of the rows: their coordinates, or their indices in the data.
        verdict: Verdict of `diagnose` on the draws of the row alone.
        at_best: Verdict if all numbers are better by two standard errors.
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
        """Indices of the n least trusted rows, the worst first."""
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


def name_rows(labels: Sequence[str], chosen: np.ndarray, badness: np.ndarray, what: str) -> str:
    """Sentence such as: 3 of 500 rows are not to be trusted: 17, 33, 240.

    Args:
        labels: Labels of all rows.
        chosen: Mask of the rows to name, (R); of more than ten, the worst are named.
        badness: Badness of each row, (R).
        what: Predicate of the sentence.
    """
    places = np.flatnonzero(chosen)
    worst = places[np.argsort(-badness[places], kind="stable")][:NAMED]
    words = ", ".join(labels[i] for i in np.sort(worst)) + (", ..." if len(places) > NAMED else ".")
    return (
        f"{len(places)} of {len(labels)} rows {'is' if len(places) == 1 else 'are'} {what}: {words}"
    )


def clearly_above_limit(khat: np.ndarray, draws: int) -> np.ndarray:
    """Whether each k-hat is significantly too large, (R).

    A k-hat is too large if it exceeds 0.7 by more than its error allows, or if it exceeds the
    limit for this number of draws and deviates from the median of all rows by more than their
    spread allows. The allowance is two standard errors for one row; for R rows it keeps the same
    probability that any row exceeds it.

    Args:
        khat: k-hat of each row, (R).
        draws: Number of draws of a row.
    """
    errors = -NormalDist().inv_cdf(CHANCE / len(khat))
    slack = np.array([khat_error(k, draws) if math.isfinite(k) else 0.0 for k in khat])
    # The error of a k-hat is proportional to 1 + k, and thus constant on a logarithmic scale.
    scale = np.log1p(np.clip(khat, -0.5, 2.0))
    middle, high = np.quantile(scale, (0.5, 1 - TOLERATED))
    spread = max((high - middle) / UPPER, khat_error(0.0, draws))
    apart = (khat >= khat_threshold(draws)) & (scale - middle >= errors * spread)
    found: np.ndarray = (khat - errors * slack >= MOST_KHAT) | apart
    return found


def exceed_noise(failed: np.ndarray, sure: np.ndarray) -> bool:
    """Whether failed rows, (R), exceed noise: any significant failure, or over 5 % of rows."""
    return bool((failed & sure).any() or failed.sum() > TOLERATED * len(failed))


def evidence_of_each(log_w: np.ndarray, khat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log evidence of each row and its error, without the leading bias. (R, S), (R) -> (R), (R).

    The log of a mean with relative variance v is v / 2 too low on average. This bias is small
    for a row, but not for a sum over many rows.
    """
    plain = [log_evidence(row) for row in log_w]
    full = [with_tail(e, row, k) for e, row, k in zip(plain, log_w, khat, strict=True)]
    values = np.array([e.value + e.se**2 / 2 for e in plain])
    return values, np.array([e.se for e in full])


def total(values: np.ndarray, errors: np.ndarray) -> Estimate:
    """Sum over rows, whose draws are independent, with its standard error."""
    return Estimate(float(values.sum()), float(np.sqrt((errors**2).sum())))

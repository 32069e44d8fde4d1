"""What is said of each row of draws that have weights for each row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from scipy.special import ndtri

from flowvi.diagnostics.finding import VERDICTS
from flowvi.diagnostics.importance import Estimate, khat_error

# Rows that a sentence or a table names.
NAMED = 10
# Chance that an estimate is off by two standard errors, to one side.
CHANCE = 0.0228
# Share of rows that may fail by no more than the errors of their numbers.
TOLERATED = 0.05


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

    def state(self) -> dict[str, Any]:
        """The table as lists of numbers and strings."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in columns.items()}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Rows:
        """The table of what `state` made."""
        found = {k: np.asarray(v) if isinstance(v, list) else v for k, v in state.items()}
        return cls(**{**found, "labels": tuple(state["labels"])})

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


def surely(khat: np.ndarray, limit: float, draws: int) -> np.ndarray:
    """Whether a k-hat is above a limit by more than the errors of so many rows explain, (R).

    Two standard errors for one row; for R rows as many as keep the chance that any of R rows at
    the limit is off by them.
    """
    errors = -float(ndtri(CHANCE / len(khat)))
    slack = np.array([khat_error(k, draws) if math.isfinite(k) else 0.0 for k in khat])
    return khat - errors * slack >= limit


def too_many(failed: np.ndarray, sure: np.ndarray) -> bool:
    """Whether rows that fail, (R), are more than noise explains: any surely, or over 5 %."""
    return bool((failed & sure).any() or failed.sum() > TOLERATED * len(failed))


def total(values: np.ndarray, errors: np.ndarray) -> Estimate:
    """The sum over rows, whose draws are independent, with its standard error."""
    return Estimate(float(values.sum()), float(np.sqrt((errors**2).sum())))

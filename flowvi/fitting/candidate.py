"""A guide that a restart may return, and how far it is to be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flowvi.diagnostics import VERDICTS, Diagnosis
from flowvi.draws.draws import Draws
from flowvi.guides.guide import Guide
from flowvi.initialization.gaussian import GaussianApproximation
from flowvi.initialization.missed_modes import describe_missed_modes
from flowvi.training.records import Evaluation

UNKNOWN = Evaluation(-math.inf)


@dataclass
class Candidate:
    """A guide, how it is built, and what is known of it.

    Attributes:
        guide: The guide.
        name: Row of `GUIDES` or `FLOWS`, or the class of a guide of the user's own.
        sizes: Arguments of `make_guide` beyond the dimensions.
        lr: Largest step size that it was trained with.
        evaluation: Its bound and gap on fresh draws.
        missed: Gaussians of the search for a start that it leaves out.
        beyond: What annealing found beyond it, in a sentence; empty without.
        diagnosis: What its draws say.
        chains: Draws of Markov chains in its space, where it came to that.
    """

    guide: Guide
    name: str
    sizes: dict[str, Any] = field(default_factory=dict)
    lr: float = 0.0
    evaluation: Evaluation = UNKNOWN
    missed: Sequence[GaussianApproximation] = ()
    beyond: str = ""
    diagnosis: Diagnosis | None = None
    chains: Draws | None = None

    @property
    def trust_rank(self) -> int:
        """0, 1 or 2: the place of its verdict in `VERDICTS`; the least is the best."""
        if self.diagnosis is None or self.reasons:
            return len(VERDICTS) - 1
        return VERDICTS.index(self.diagnosis.verdict)

    @property
    def bound(self) -> float:
        """The bound on fresh draws."""
        return self.evaluation.bound

    @property
    def gap(self) -> float:
        """How far the bound is below the log evidence; infinite where that is not known."""
        gap = self.evaluation.gap
        return gap if math.isfinite(gap) else math.inf

    @property
    def covered(self) -> float:
        """Log of the mass that it covers: its bound and what that is below, if it is known."""
        return self.bound + self.gap if math.isfinite(self.gap) else self.bound

    @property
    def reasons(self) -> list[str]:
        """What is missed, for the reasons of the verdict."""
        seen = [describe_missed_modes(self.missed, self.covered)] if self.missed else []
        return [*seen, self.beyond] if self.beyond else seen

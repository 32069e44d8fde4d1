"""A guide that a restart may return, with its evaluation and verdict."""

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
    """A guide, the arguments that build it, and its evaluation.

    Attributes:
        guide: The guide.
        name: Name in `GUIDES` or `FLOWS`, or the class of a user's guide.
        sizes: Arguments of `make_guide` beyond the dimensions.
        lr: Largest step size of its training.
        evaluation: Bound and gap on fresh draws.
        missed: Gaussians of the search for a start that it misses.
        beyond: Sentence about mass outside of it that annealing found; else empty.
        diagnosis: Verdict on its draws.
        weighted: Draws of the check, which further guides are fitted to, and where chains start.
        opinion: What short chains said of its draws, or why they were left out; empty before.
        drifts: Whether they drift away from its draws.
        bridge: Log evidence by them and its standard error, if they tell.
        units: Sentence about units whose conditional does not fit; else empty.
        chains: Draws of Markov chains in its space, if they were run.
    """

    guide: Guide
    name: str
    sizes: dict[str, Any] = field(default_factory=dict)
    lr: float = 0.0
    evaluation: Evaluation = UNKNOWN
    missed: Sequence[GaussianApproximation] = ()
    missed_mass: str = ""
    units: str = ""
    diagnosis: Diagnosis | None = None
    chains: Draws | None = None
    weighted: Draws | None = None
    opinion: str = ""
    drifts: bool = False
    bridge: tuple[float, float] | None = None

    def keep(self, draws: Draws) -> None:
        """Keep the draws of the check."""
        self.weighted = draws

    @property
    def trust_rank(self) -> int:
        """Index of its verdict in `VERDICTS`, 0 to 2; the lowest is the best."""
        if self.diagnosis is None or self.reasons or self.drifts:
            return len(VERDICTS) - 1
        return VERDICTS.index(self.diagnosis.verdict)

    @property
    def bound(self) -> float:
        """The bound on fresh draws."""
        return self.evaluation.bound

    @property
    def gap(self) -> float:
        """Distance of the bound below the log evidence; infinite if unknown."""
        gap = self.evaluation.gap
        return gap if math.isfinite(gap) else math.inf

    @property
    def covered(self) -> float:
        """Log of the mass that the guide covers: its bound plus its gap, if that is known."""
        return self.bound + self.gap if math.isfinite(self.gap) else self.bound

    @property
    def reasons(self) -> list[str]:
        """Reasons of the verdict: the parts of the posterior that the guide misses."""
        seen = [describe_missed_modes(self.missed, self.covered)] if self.missed else []
        return [*seen, *(sentence for sentence in (self.missed_mass, self.units) if sentence)]

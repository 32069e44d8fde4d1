"""The table of many data sets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from flowvi.diagnostics import VERDICTS, Diagnosis
from flowvi.draws.draws import Draws
from flowvi.runtime.display import Displayed

if TYPE_CHECKING:
    import pandas as pd

GUIDE, FIT, CHAINS, FAILED = "guide", "fit", "NUTS", "failed"
# Lines of a table that are printed at either end.
SHOWN = 5


@dataclass(frozen=True)
class Line:
    """What is known of one data set.

    Attributes:
        verdict: Verdict on its draws.
        method: "guide", "fit", "NUTS", or "failed".
        khat: Pareto k-hat of the weights.
        ess: Effective draws.
        draws: Number of draws.
        log_evidence, log_evidence_se: NaN without.
        unlike: Share of simulated data sets that are as far from their centre.
        seconds: Time for it.
        steps: Steps of its own fit; 0 without one.
        reason: The first reason of the verdict, or the message of a failure.
    """

    verdict: str
    method: str
    khat: float = math.nan
    ess: float = math.nan
    draws: int = 0
    log_evidence: float = math.nan
    log_evidence_se: float = math.nan
    unlike: float = math.nan
    seconds: float = 0.0
    steps: int = 0
    reason: str = ""

    @property
    def trusted(self) -> bool:
        """Whether plain or resampled draws are trusted."""
        return self.verdict in VERDICTS[:2]


def line_of(
    diagnosis: Diagnosis, method: str, unlike: float, seconds: float, steps: int = 0
) -> Line:
    """The line of a data set whose draws were judged."""
    return Line(
        diagnosis.verdict,
        method,
        diagnosis.khat,
        diagnosis.ess,
        diagnosis.draws,
        diagnosis.log_evidence,
        diagnosis.log_evidence_se,
        unlike,
        seconds,
        steps,
        diagnosis.reasons[0] if diagnosis.reasons else "",
    )


@dataclass(repr=False)
class Fits(Displayed):
    """Verdicts on many data sets, and their draws: ``fits[i]``.

    Attributes:
        name: Name of the model.
        lines: One for each data set, in their order.
        drawn: Function of the place of a data set that returns its draws.
    """

    name: str
    lines: list[Line]
    drawn: Callable[[int], Draws] = field(repr=False)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> Draws:
        """Draws of a data set: those of the guide, or of its own fit."""
        if not isinstance(i, int | np.integer):
            raise TypeError(f"fits[i] takes the place of one data set; got {i!r}.")
        place = int(i) + len(self) * (i < 0)
        if not 0 <= place < len(self):
            raise IndexError(f"There are {len(self)} data sets; got {i}.")
        return self.drawn(place)

    def __iter__(self) -> Iterator[Draws]:
        return map(self.drawn, range(len(self)))

    @property
    def verdicts(self) -> tuple[str, ...]:
        """Verdict on each data set."""
        return tuple(line.verdict for line in self.lines)

    @property
    def trusted(self) -> np.ndarray:
        """Whether plain or resampled draws are trusted, (M)."""
        return np.array([line.trusted for line in self.lines])

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each data set."""
        import pandas as pd  # slow to import

        return pd.DataFrame([asdict(line) for line in self.lines]).rename_axis("data set")

    def summary(self) -> str:
        """How many data sets are trusted, and by what."""
        count = len(self)
        methods = Counter(line.method for line in self.lines)
        by = ", ".join(f"{n} by {_with_article(name)}" for name, n in methods.items() if n)
        return f"{self.name}: {int(self.trusted.sum())} of {count} data sets trusted ({by})"

    def __str__(self) -> str:
        count = len(self)
        verdicts = Counter(self.verdicts)
        lines = [
            self.summary(),
            "  verdicts: " + ", ".join(f"{verdicts[v]} x {v}" for v in VERDICTS if verdicts[v]),
            f"  {'':>6} {'verdict':<26} {'method':<7} {'k-hat':>6} {'effective':>9} "
            f"{'log evidence':>20} {'unlike p':>8}",
        ]
        places: list[int] = list(range(count))
        if count > 2 * SHOWN + 1:
            places = [*places[:SHOWN], -1, *places[-SHOWN:]]
        rows = ["     ..." if i < 0 else _words(i, self.lines[i]) for i in places]
        return "\n".join([*lines, *rows])


def _with_article(method: str) -> str:
    return {GUIDE: "the guide", FIT: "a fit of their own", CHAINS: "NUTS"}.get(method, "nothing")


def _words(i: int, line: Line) -> str:
    evidence = "none"
    if math.isfinite(line.log_evidence):
        evidence = f"{line.log_evidence:.3f} +- {line.log_evidence_se:.2g}"
    return (
        f"  {i:>6} {line.verdict:<26} {line.method:<7} {line.khat:>6.2f} {line.ess:>9.0f} "
        f"{evidence:>20} {line.unlike:>8.2g}"
    )


def line_from(state: Mapping[str, Any]) -> Line:
    """The line that `dataclasses.asdict` took apart."""
    return Line(**state)

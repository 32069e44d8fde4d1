"""An observation on the way to a verdict, and the verdict that observations leave open."""

from collections.abc import Sequence
from typing import NamedTuple

VERDICTS = TRUST, RESAMPLE, DISTRUST = ("trust", "trust the resampled draws", "do not trust")


class Finding(NamedTuple):
    """An observation.

    Attributes:
        verdict: The best verdict that it leaves open, errors of two standard errors included.
        reason: A sentence.
        granted: The best verdict that it leaves open if these errors speak for the draws; that
            of `verdict` if empty.
    """

    verdict: str
    reason: str
    granted: str = ""


class Check(NamedTuple):
    """What the check of a fit found, by draws of its own.

    Attributes:
        verdict: The verdict.
        khat: Pareto shape of the weights' tail; None for Markov chains.
        draws: Number of draws behind it.
    """

    verdict: str
    khat: float | None
    draws: int

    def __str__(self) -> str:
        khat = "" if self.khat is None else f", with k-hat {self.khat:.2f}"
        return f'The fit\'s own check by {self.draws} draws says "{self.verdict}"{khat}'


def verdicts(found: Sequence[Finding]) -> tuple[str, str]:
    """The best verdict that every finding leaves open: as it is, and if errors are granted."""
    strict = max((f.verdict for f in found), key=VERDICTS.index, default=TRUST)
    return strict, max((f.granted or f.verdict for f in found), key=VERDICTS.index, default=TRUST)


def verdict(found: Sequence[Finding]) -> str:
    """The best verdict that every finding leaves open."""
    return verdicts(found)[0]


def decided(strict: str, best: str, draws: int, check: Check | None) -> str:
    """The verdict on draws of a fit that has been checked by others.

    The check's verdict stands unless the draws speak against it, whatever their errors. A better
    one takes more draws than the check had.

    Args:
        strict: The verdict of the draws alone.
        best: The verdict if their errors speak for them.
        draws: How many there are.
        check: What the check of the fit found.
    """
    if check is None:
        return strict
    if draws > check.draws:
        return max(best, min(check.verdict, strict, key=VERDICTS.index), key=VERDICTS.index)
    return max(best, check.verdict, key=VERDICTS.index)


def reasons(found: Sequence[Finding]) -> tuple[str, ...]:
    """The sentences, those that decide first."""
    return tuple(finding.reason for finding in sorted(found, key=_severity, reverse=True))


def _severity(finding: Finding) -> int:
    return VERDICTS.index(finding.verdict)

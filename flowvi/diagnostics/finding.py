"""Findings, and the verdict that follows from them."""

from collections.abc import Sequence
from typing import NamedTuple

VERDICTS = TRUST, RESAMPLE, DISTRUST = ("trust", "trust the resampled draws", "do not trust")


class Finding(NamedTuple):
    """An observation that limits the verdict.

    Attributes:
        verdict: The best verdict that the finding allows, with errors of two standard errors.
        reason: A sentence.
        granted: The best verdict that it allows if the numbers are better by these errors;
            empty if it equals `verdict`.
    """

    verdict: str
    reason: str
    granted: str = ""


class Check(NamedTuple):
    """Result of the check of a fit on separate draws.

    Attributes:
        verdict: The verdict.
        khat: Pareto shape of the weights' tail; None for Markov chains, and without a tail.
        draws: Number of draws.
    """

    verdict: str
    khat: float | None
    draws: int

    def __str__(self) -> str:
        khat = "" if self.khat is None else f", with k-hat {self.khat:.2f}"
        return f'The fit\'s own check by {self.draws} draws says "{self.verdict}"{khat}'


def verdicts(found: Sequence[Finding]) -> tuple[str, str]:
    """The best verdicts that all findings allow: as they are, and within their errors."""
    strict = max((f.verdict for f in found), key=VERDICTS.index, default=TRUST)
    return strict, max((f.granted or f.verdict for f in found), key=VERDICTS.index, default=TRUST)


def verdict(found: Sequence[Finding]) -> str:
    """The best verdict that all findings allow."""
    return verdicts(found)[0]


def decided(strict: str, best: str, draws: int, check: Check | None) -> str:
    """The verdict on draws of a fit that was checked on separate draws.

    The check's verdict stands unless the draws contradict it beyond their errors. Only more
    draws than those of the check can improve it.

    Args:
        strict: The verdict of the draws alone.
        best: The verdict if all numbers are better by their errors.
        draws: Number of draws.
        check: Result of the fit's own check.
    """
    if check is None:
        return strict
    if draws > check.draws:
        return max(best, min(check.verdict, strict, key=VERDICTS.index), key=VERDICTS.index)
    return max(best, check.verdict, key=VERDICTS.index)


def reasons(found: Sequence[Finding]) -> tuple[str, ...]:
    """The sentences of the findings, the decisive ones first."""
    return tuple(finding.reason for finding in sorted(found, key=_severity, reverse=True))


def _severity(finding: Finding) -> int:
    return VERDICTS.index(finding.verdict)

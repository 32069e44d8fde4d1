"""The verdict on the plain and the resampled draws of a fit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from flowvi.diagnostics import finding, findings
from flowvi.diagnostics.finding import DISTRUST, RESAMPLE, TRUST, VERDICTS, Check, Finding
from flowvi.diagnostics.importance import (
    Psis,
    as_chains,
    elbo,
    gap,
    khat_error,
    khat_threshold,
    log_evidence,
    psis,
    with_tail,
)
from flowvi.diagnostics.moments import Axes, compare
from flowvi.diagnostics.rows import Rows
from flowvi.diagnostics.undefined_moments import heavy
from flowvi.diagnostics.weight_regions import where
from flowvi.runtime.display import Displayed


@dataclass(frozen=True, repr=False)
class Diagnosis(Displayed):
    """Verdict on the draws of a fit, with the numbers behind it.

    Attributes:
        verdict: ``"trust"`` (the plain draws), ``"trust the resampled draws"`` or
            ``"do not trust"``.
        reasons: Sentences that explain the verdict, the most important first.
        khat: Pareto shape of the weights' tail; -inf for bounded weights.
        khat_threshold: Smallest k-hat at which the weights are unreliable.
        ess: Effective number of draws, 1 / sum of squared normalised weights.
        draws: Number of draws.
        elbo, elbo_se: Evidence lower bound and its standard error.
        gap, gap_se: Log evidence minus ELBO: an estimate of KL(q || p).
        log_evidence, log_evidence_se: NaN where a prior is improper.
        title: Description of the fit, in one line.
        rhat: Largest R-hat, for draws of Markov chains. For these, `ess` is the smallest
            bulk or tail ESS, and attributes that need weights are NaN.
        divergences: Number of divergent trajectories.
        distances: Energy coefficient of every two restarts, 0 if equal; empty for one restart.
        at_best: Verdict if all numbers are better by two standard errors. If it differs from the
            verdict of the draws alone, other draws could change the verdict.
        rows: Verdict and numbers of each row for draws with a row axis; else None. The other
            attributes then cover all rows: the largest k-hat, the fewest effective draws, sums
            of ELBOs, gaps and log evidences, and `draws` of each row.
    """

    verdict: str
    reasons: tuple[str, ...]
    khat: float
    khat_threshold: float
    ess: float
    draws: int
    elbo: float
    elbo_se: float
    gap: float
    gap_se: float
    log_evidence: float
    log_evidence_se: float
    title: str = ""
    rhat: float = math.nan
    divergences: int = 0
    distances: tuple[tuple[float, ...], ...] = ()
    at_best: str = ""
    rows: Rows | None = None

    @property
    def khat_se(self) -> float:
        """Standard error of k-hat; NaN without weights, or where k-hat is not finite."""
        return khat_error(self.khat, self.draws) if math.isfinite(self.khat) else math.nan

    @property
    def near(self) -> bool:
        """Whether other draws could change the verdict.

        True if the verdict would improve within the errors of these numbers, or if it relies on
        a k-hat less than a standard error below its limit.
        """
        flat = self.gap + 2 * self.gap_se <= findings.FLAT_GAP
        close = self.khat < self.khat_threshold <= self.khat + self.khat_se
        return self.at_best not in ("", self.verdict) or (
            self.verdict != DISTRUST and close and not flat
        )

    def __str__(self) -> str:
        lines = [f"Verdict: {self.verdict}", *([self.title] if self.title else [])]
        numbers = [
            f"  {name:<12} {value:>10}    {note}".rstrip() for name, value, note in self.numbers()
        ]
        reasons = [f"  - {reason}" for reason in self.reasons]
        if self.rows is None:
            return "\n".join([*lines, *numbers, *reasons])
        return "\n".join([*lines, *reasons, *numbers, str(self.rows)])

    def numbers(self) -> list[tuple[str, str, str]]:
        """The numbers behind the verdict: name, value, and what it means."""
        return self._of_weights() if math.isnan(self.rhat) else self._of_chains()

    def _of_chains(self) -> list[tuple[str, str, str]]:
        rows = [
            ("R-hat", f"{self.rhat:.3f}", "the largest"),
            ("divergences", str(self.divergences), ""),
            ("draws", str(self.draws), f"effective {self.ess:.0f}"),
        ]
        if math.isnan(self.elbo):
            return rows
        return [*rows, *self._of_evidence()]

    def _of_evidence(self) -> list[tuple[str, str, str]]:
        evidence = ("log evidence", f"{self.log_evidence:.3f}", f"+- {self.log_evidence_se:.2g}")
        if math.isnan(self.log_evidence):
            evidence = ("log evidence", "none", "")
        note = f"+- {self.elbo_se:.2g}; KL(q || p) {self.gap:.3g}"
        return [evidence, ("ELBO", f"{self.elbo:.3f}", note)]

    def _of_weights(self) -> list[tuple[str, str, str]]:
        limit = f"{self.khat_threshold:.2f}"
        if self.rows is not None:
            note = f"the largest; {np.sum(self.rows.khat >= self.khat_threshold)} not below {limit}"
        elif self.khat < self.khat_threshold:
            note = f"weights can be trusted (below {limit})"
        elif self.verdict == TRUST and self.gap <= findings.FLAT_GAP:
            note = f"not below {limit}, of weights that are nearly equal"
        elif self.verdict != DISTRUST or findings.undecided_tail(self.khat, self.draws):
            note = f"+- {self.khat_se:.2f}: not surely below {limit}"
        else:
            note = f"heavy-tailed weights (not below {limit})"
        least, each = ("at least ", ", of each row") if self.rows is not None else ("", "")
        return [
            ("Pareto k-hat", f"{self.khat:.2f}", note),
            *self._of_evidence(),
            ("draws", str(self.draws), f"{least}effective {self.ess:.0f}{each}"),
        ]


def diagnose(
    log_weights: ArrayLike,
    values: Mapping[str, np.ndarray] | None = None,
    improper: Sequence[str] = (),
    title: str = "",
    missed: Sequence[str] = (),
    axes: Axes | None = None,
    check: Check | None = None,
    doubts: Sequence[str] = (),
    outside: str = "",
) -> Diagnosis:
    """Judge draws by their log weights and the effect of reweighting on their moments.

    Plain draws are trusted if reweighting moves no mean by more than 0.15 sds and no
    sd by more than 15 %, two standard errors included, and if the weights are
    reliable: k-hat is below its threshold, or KL(q || p) <= 0.005. Without values,
    the condition on moments is replaced by KL(q || p) <= 0.15^2 / 2. Resampled draws
    are trusted if k-hat is below its threshold, and if every mean has 400 and every
    sd 200 effective draws. For either verdict, restarts must agree on the evidence
    and on the moments. No draws can show a mode that every guide has missed.

    If the fit was checked on separate draws, the check's verdict stands unless these draws
    exceed a limit by more than two standard errors. More draws than those of the check may also
    improve it.

    Args:
        log_weights: (draw) or (chain, draw); chains are independent fits.
        values: Arrays (chain, draw, ...) by name, the latent vector among them.
        improper: Sites with improper priors: there is no evidence then.
        title: Description of the fit, in one line.
        missed: Known parts of the posterior that the draws miss, in sentences.
        axes: Labels of the elements of the values, for the reasons.
        check: Result of the fit's own check.
        doubts: Reasons against the plain draws other than the weights, in sentences.
        outside: Sentence with the reason for draws of weight zero.
    """
    chains = as_chains(log_weights)
    arrays = {name: _by_chain(name, array, log_weights) for name, array in (values or {}).items()}
    known = [Finding(DISTRUST, sentence) for sentence in missed]
    known += [Finding(RESAMPLE, sentence) for sentence in doubts]
    return judge(chains, arrays, None, axes, known, improper, title, check, outside)


def judge(
    chains: np.ndarray,
    arrays: Mapping[str, np.ndarray],
    smooth: Psis | None,
    axes: Axes | None = None,
    known: Sequence[Finding] = (),
    improper: Sequence[str] = (),
    title: str = "",
    check: Check | None = None,
    outside: str = "",
    explain: bool = True,
) -> Diagnosis:
    """Compute the verdict of `diagnose`.

    Args:
        chains: Log weights, (chain, draw), checked.
        arrays: Values, (chain, draw, ...).
        smooth: Result of `psis` for the weights, if available.
        axes: Labels of the elements of the values.
        known: Findings from other sources than the draws.
        improper: Sites with improper priors.
        title: Description of the fit.
        check: Result of the fit's own check.
        outside: Sentence with the reason for draws of weight zero.
        explain: Whether to search for the scalars that cause the verdict, the slowest part.
    """
    kept, found = findings.restarts(chains)
    chains = chains[kept]
    arrays = {name: array[kept] for name, array in arrays.items()}
    log_w = chains.ravel()
    smoothed, khat = psis(log_w) if smooth is None or not kept.all() else smooth
    threshold, weights = khat_threshold(log_w.size), np.exp(smoothed)
    ess = float(1 / np.sum(weights**2))

    found += [*findings.weights(log_w, outside), *findings.evidences(chains)]
    comparison = None
    if findings.nearly_constant(log_w, -2.0) or findings.undecided_tail(khat, log_w.size):
        if arrays:
            comparison = compare(weights.reshape(chains.shape), np.isfinite(chains), arrays, axes)
            found += [*findings.moments(comparison), *findings.disagreement(comparison)]
        else:
            found += findings.divergence(log_w)
    found += findings.tail(log_w, khat, threshold, *finding.verdicts(found))
    poor = finding.verdicts(found)[1] == DISTRUST
    if RESAMPLE in finding.verdicts(found):
        found += findings.effective(ess, log_w.size, comparison, finding.verdicts(found)[1])
    strict, best = finding.verdicts(found)
    final = finding.decided(strict, best, log_w.size, check)
    first = findings.ask_for_draws(log_w.size, strict, poor, final, check)

    verdict = max(final, finding.verdicts(known)[0], key=VERDICTS.index)
    if explain and khat >= threshold and arrays and verdict != TRUST:
        place = where(chains, arrays).sentence
        found += [Finding(TRUST, place)] if place else []
    if explain and comparison is not None and verdict != TRUST:
        found += heavy(comparison, chains, arrays, axes)
    reasons = finding.reasons([*known, *found, *findings.priors(improper)])
    reasons = (*first, *reasons) if verdict == final else (*reasons, *first)

    return Diagnosis(
        verdict,
        reasons,
        khat,
        threshold,
        ess,
        log_w.size,
        *elbo(log_w),
        *gap(log_w),
        *((math.nan, math.nan) if improper else with_tail(log_evidence(log_w), log_w, khat)),
        title=title,
        at_best=max(best, finding.verdicts(known)[0], key=VERDICTS.index),
    )


def _by_chain(name: str, array: np.ndarray, log_weights: ArrayLike) -> np.ndarray:
    """Reshape values (draw, ...) or (chain, draw, ...) to (chain, draw, ...)."""
    leading = np.shape(log_weights)
    if np.shape(array)[: len(leading)] != leading:
        raise ValueError(
            f"Values of '{name}' must begin with the shape {leading} of the log weights; "
            f"got {np.shape(array)}."
        )
    return np.asarray(array)[None] if len(leading) == 1 else np.asarray(array)

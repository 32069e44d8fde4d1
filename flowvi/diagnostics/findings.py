"""Findings behind a verdict, each with a sentence.

Each check returns a list of findings, which may be empty.
"""

import math
from collections.abc import Sequence

import numpy as np

from flowvi.diagnostics.energy_distance import Distances
from flowvi.diagnostics.finding import DISTRUST, RESAMPLE, TRUST, VERDICTS, Check, Finding
from flowvi.diagnostics.importance import (
    MOST_KHAT,
    ROUNDING,
    gap,
    khat_error,
    log_evidence,
)
from flowvi.diagnostics.moments import Comparison
from flowvi.diagnostics.pareto import log_sum

# Largest error of a mean, in posterior sds, and largest relative error of a sd, for "trust".
TOLERANCE = 0.15
# KL(q || p) moves a mean by at most sqrt(2 KL) sds (Talagrand; exact for Gaussians). A sd
# with an error of 15 % needs a larger KL than this.
MAX_GAP = TOLERANCE**2 / 2
# The standard error of a weighted mean is 1 / sqrt(ESS) sds, that of a Gaussian's sd
# 1 / sqrt(2 ESS). The tolerance is three standard errors.
MIN_ESS = (3 / TOLERANCE) ** 2
MIN_ESS_SD = MIN_ESS / 2
# Factor by which the effective draws may fall short and still be made up by more draws of the
# same guide: the check of a fit takes up to four times the draws of `Fit.draw`.
WANT = 6.0
# Least number of draws to ask for, and the factor for more than this number.
ASKED, AGAIN = 4000, 4
# Below this divergence, heavy-tailed weights do not matter. The value is well below MAX_GAP,
# because a part of such a tail is unobserved.
FLAT_GAP = 0.005
# R-hat of restarts whose means scatter by about a third of a sd.
MAX_RHAT = 1.05
# Least distance of two restarts, relative to that of the halves of one, to be reported.
FAR = 3.0
# A restart with a smaller share of the evidence has failed: resampling almost drops it.
MIN_SHARE = 0.01
# Largest spread of the restarts' log evidences, unless four standard errors are larger.
MAX_SPREAD = 0.05


def restarts(chains: np.ndarray) -> tuple[np.ndarray, list[Finding]]:
    """Mask of the restarts to keep, (chain), and a finding on the others."""
    evidence = log_sum(chains)
    kept = evidence >= evidence.max() + math.log(MIN_SHARE)
    if kept.all():
        return kept, []
    names = ", ".join(str(chain) for chain in np.flatnonzero(~kept))
    reason = (
        f"Restart {names} found less than {MIN_SHARE:.0%} of the best restart's evidence. The "
        "numbers are those of the other restarts. Resampling keeps almost none of its draws."
    )
    return kept, [Finding(RESAMPLE, reason)]


def weights(log_w: np.ndarray, outside: str = "") -> list[Finding]:
    """Findings on weights that are zero or constant.

    Args:
        log_w: Log weights, (S).
        outside: Sentence with the reason for density zero at some draws.
    """
    found = []
    finite = log_w[np.isfinite(log_w)]
    if len(finite) < len(log_w):
        reason = (
            f"{len(log_w) - len(finite)} of {len(log_w)} draws have weight zero: there the "
            "model's density is zero or not a number, so that the ELBO is -inf."
            f"{f' {outside}' if outside else ''}"
        )
        found.append(Finding(RESAMPLE, reason))
    elif np.ptp(finite) <= ROUNDING:
        found.append(Finding(TRUST, "Weights constant to rounding: the guide q equals p."))
    return found


def evidences(chains: np.ndarray) -> list[Finding]:
    """Finding on restarts with different evidences."""
    values, errors = np.transpose([log_evidence(chain) for chain in chains])
    low, high = np.argmin(values), np.argmax(values)
    spread = values[high] - values[low]
    if spread <= max(MAX_SPREAD, 4 * math.hypot(errors[low], errors[high])):
        return []
    reason = (
        f"Restarts disagree about the evidence, from {values[low]:.2f} to {values[high]:.2f}: some "
        "miss a part of the posterior. Use the best one alone, or a more flexible guide."
    )
    return [Finding(DISTRUST, reason)]


def divergence(log_w: np.ndarray) -> list[Finding]:
    """Whether KL(q || p) is small enough to bound the error of every moment."""
    value, error = gap(log_w)
    if value + 2 * error <= MAX_GAP:
        reason = f"KL(q || p) = {value:.2g}: no mean is off by {TOLERANCE} sd."
        return [Finding(TRUST, reason)]
    reason = (
        f"KL(q || p) = {value:.2g}: a mean of the plain draws may be off by up to "
        f"{math.sqrt(2 * value):.2g} sd. To tell, diagnose the draws, not only their weights."
    )
    return [Finding(RESAMPLE, reason, TRUST if value - 2 * error <= MAX_GAP else RESAMPLE)]


def moments(c: Comparison) -> list[Finding]:
    """Finding on differences of means and sds between plain and reweighted draws."""
    found = []
    if c.skipped:
        names = ", ".join(f"'{name}'" for name in c.skipped)
        found.append(Finding(TRUST, f"Not judged, because of values that are not finite: {names}."))
    if not c.labels:
        return found
    shift, stretch = np.argmax(np.abs(c.shift)), np.argmax(np.abs(c.stretch))
    moved = (
        f"Reweighting moves the mean of {c.labels[shift]} by {c.shift[shift]:+.2g} sd and the sd "
        f"of {c.labels[stretch]} by {math.expm1(c.stretch[stretch]):+.1%}"
    )
    if not np.any(exceeds_tolerance(c)):
        return [*found, Finding(TRUST, f"{moved}; no mean or sd changes more.")]
    if np.any(exceeds_tolerance(c, -2.0)):
        return [*found, Finding(RESAMPLE, f"{moved}: the plain draws are off.")]
    i, j = np.argmax(np.abs(c.shift) + 2 * c.shift_se), np.argmax(c.stretch_se)
    reason = (
        f"{moved}. That the plain draws are off by less than {TOLERANCE} sd and {TOLERANCE:.0%} is "
        f"not certain: the errors are up to {c.shift_se[i]:.2g} sd and {c.stretch_se[j]:.0%}."
    )
    return [*found, Finding(RESAMPLE, reason, TRUST)]


def exceeds_tolerance(c: Comparison, errors: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Whether the error of the plain mean, and sd, of each scalar may be too large, (P), (P).

    Args:
        c: Comparison of plain and reweighted draws.
        errors: Standard errors to add; with a negative number, errors that are certain.
    """
    mean_error = np.abs(c.shift) + errors * c.shift_se
    sd_error = np.expm1(np.abs(c.stretch) + errors * c.stretch_se)
    return ~(mean_error <= TOLERANCE), ~(sd_error <= TOLERANCE)


def disagreement(c: Comparison) -> list[Finding]:
    """Finding on restarts with different locations, plain or even reweighted."""
    if not c.labels:
        return []
    plain, weighted = np.argmax(c.rhat), np.argmax(c.rhat_weighted)
    if c.rhat_weighted[weighted] > MAX_RHAT:
        reason = (
            f"Restarts differ even when reweighted, R-hat {c.rhat_weighted[weighted]:.2f} "
            f"({c.labels[weighted]}): they found different parts of the posterior, and how much "
            "each part holds cannot be told from these draws."
        )
        return [Finding(DISTRUST, reason)]
    if c.rhat[plain] > MAX_RHAT:
        where = f"R-hat {c.rhat[plain]:.2f} ({c.labels[plain]})"
        return [Finding(RESAMPLE, f"Restarts differ, {where}, but agree when reweighted.")]
    return []


def distant_restarts(found: Distances) -> list[Finding]:
    """Finding on the two most distant restarts, if their distance exceeds noise."""
    i, j = np.unravel_index(np.argmax(found.matrix), found.matrix.shape)
    largest = found.matrix[i, j]
    if largest <= FAR * found.noise:
        return []
    reason = (
        f"Restarts {i} and {j} are farthest apart: energy coefficient {largest:.3f} of 1, where "
        f"two halves of one restart differ by {found.noise:.3f}."
    )
    return [Finding(TRUST, reason)]


def effective(ess: float, draws: int, c: Comparison | None, best: str) -> list[Finding]:
    """Finding on too few effective draws, for any mean or sd, for resampling.

    Args:
        ess: 1 / sum of squared normalised weights.
        draws: Number of draws.
        c: Comparison of plain and reweighted draws.
        best: The best verdict that remains if all numbers are better by their errors.
    """
    needs = [(MIN_ESS / ess, ess, "")]
    if c is not None and c.labels:
        kinds = (("mean", c.ess_mean, MIN_ESS), ("sd", c.ess_sd, MIN_ESS_SD))
        for kind, values, least in kinds:
            i = np.argmin(values)
            needs.append((least / values[i], values[i], f" for the {kind} of {c.labels[i]}"))
    factor, worst, what = max(needs)
    if factor <= 1:
        return []
    wanted = max(math.ceil(draws * factor / 1000) * 1000, ASKED)
    reason = (
        f"Only {worst:.0f} effective draws{what}: resample from about {wanted} draws, "
        f"fit.draw({wanted})."
    )
    few = best == RESAMPLE and factor > WANT
    return [Finding(DISTRUST, reason, DISTRUST if few else best)]


def tail(log_w: np.ndarray, khat: float, threshold: float, so_far: str, best: str) -> list[Finding]:
    """Finding on a heavy tail of the weights, which matters unless they are nearly equal.

    Args:
        log_w: Log weights, (S).
        khat: Pareto shape of the tail.
        threshold: Limit of k-hat for this number of weights.
        so_far: The verdict of all other findings.
        best: That verdict if all numbers are better by their errors.
    """
    if khat < threshold:
        return []
    if so_far == TRUST and nearly_constant(log_w):
        largest = math.exp(log_w.max() - log_evidence(log_w).value)
        reason = (
            f"Trusted although Pareto k-hat {khat:.2f} is not below {threshold:.2f}: k-hat is the "
            "shape of the weights' tail, not its size, and the weights hardly vary. The "
            f"largest is {largest:.3g} times their mean and KL(q || p) = {gap(log_w).value:.2g}: "
            "there is nothing to correct."
        )
        return [Finding(TRUST, reason)]
    error = khat_error(khat, len(log_w))
    open_to = TRUST if undecided_tail(khat, len(log_w)) else DISTRUST
    if best == TRUST and nearly_constant(log_w, -2.0):
        open_to = TRUST
    if open_to == TRUST:
        reason = (
            f"Pareto k-hat {khat:.2f} is not below {threshold:.2f}, the limit for {len(log_w)} "
            f"draws; with its standard error of {error:.2g}, the true value may be below."
        )
        return [Finding(DISTRUST, reason, TRUST)]
    reason = (
        f"Pareto k-hat {khat:.2f} is not below {threshold:.2f}: a few draws carry the weights, so "
        "neither resampling nor the evidence can be relied on. The guide is too poor an "
        "approximation, or the model does not suit the data: try a more flexible guide, more "
        "steps, or another parametrisation."
    )
    return [Finding(DISTRUST, reason)]


def undecided_tail(khat: float, draws: int) -> bool:
    """Whether k-hat is within two standard errors of the limit for many draws."""
    return khat - 2 * khat_error(khat, draws) < MOST_KHAT


def ask_for_draws(
    draws: int, strict: str, poor: bool, final: str, check: Check | None
) -> list[str]:
    """Sentences that ask for more draws if there are too few, and give the check's verdict.

    Args:
        draws: Number of draws.
        strict: The verdict of the draws alone.
        poor: Whether the draws show that the guide is poor, beyond their errors. Too few
            effective draws do not.
        final: The verdict, the result of `decided`.
        check: Result of the fit's own check.
    """
    few = draws < MIN_ESS and not poor
    unclear = final == DISTRUST and not poor
    words = []
    if few or unclear:
        what = "are few" if few else "are too few to tell on which side of a limit the guide is"
        words.append(
            f"{draws} draws {what}: draw more, for example fit.draw({_draws_to_ask_for(draws)})."
        )
    if check is not None:
        place = VERDICTS.index
        if place(final) > place(check.verdict):
            against = "are too few to be resampled" if unclear else "contradict it"
            words.append(f"{check}; these {draws} draws {against}.")
        elif place(final) < place(check.verdict):
            words.append(f"{check}; these draws are more, so their verdict counts.")
        elif few or final != strict:
            words.append(f"{check}; these {draws} draws do not contradict it.")
    elif unclear:
        words.append("These draws do not show whether the guide is good or poor.")
    return [" ".join(words)] if words else []


def _draws_to_ask_for(draws: int) -> int:
    """Number of draws to ask for."""
    return ASKED if draws < ASKED else AGAIN * draws


def judge_mean_weight(log_w: np.ndarray, khat: float, threshold: float) -> Finding:
    """Finding on the reliability of the mean weight and its standard error."""
    if khat < threshold:
        shown = f"k-hat {khat:.2f} is below {threshold:.2f}"
        if khat < 0.5:
            return Finding(TRUST, f"The weights can be averaged over: {shown}.")
        reason = (
            f"The weights can be averaged over, {shown}; but above 0.5 their variance may be "
            "infinite, and the standard errors too small."
        )
        return Finding(TRUST, reason)
    if nearly_constant(log_w):
        reason = f"The weights hardly vary: KL(q || p) = {gap(log_w).value:.2g}."
        return Finding(TRUST, reason)
    if undecided_tail(khat, len(log_w)):
        reason = (
            f"Pareto k-hat {khat:.2f} is not below {threshold:.2f}; with its standard error of "
            f"{khat_error(khat, len(log_w)):.2g}, the true value may be below. Draw more, for "
            f"example fit.draw({_draws_to_ask_for(len(log_w))}). The lower bounds hold in any case."
        )
        return Finding(DISTRUST, reason)
    reason = (
        f"Pareto k-hat {khat:.2f} is not below {threshold:.2f}: the mean weight rests on a few "
        "draws, and the evidence is probably higher. The lower bounds hold all the same."
    )
    return Finding(DISTRUST, reason)


def nearly_constant(log_w: np.ndarray, errors: float = 2.0) -> bool:
    """Whether the weights vary so little that a correction has no effect.

    Args:
        log_w: Log weights, (S).
        errors: Standard errors of KL(q || p) to add.
    """
    value, error = gap(log_w)
    return value + errors * error <= FLAT_GAP


def priors(improper: Sequence[str]) -> list[Finding]:
    """Finding on improper priors, for which there is no evidence."""
    if not improper:
        return []
    names = ", ".join(f"'{name}'" for name in improper)
    reason = (
        f"No evidence: the prior of {names} is improper. The ELBO is that of a density without a "
        "normaliser: it compares guides for this model, and nothing else."
    )
    return [Finding(TRUST, reason)]

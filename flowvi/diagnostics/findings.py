"""What is observed on the way to a verdict, each with the sentence that says it.

Every observation is a list of findings, empty where there is nothing to say.
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

# The largest error of a mean, in posterior sds, and of a sd, relative, that "trust" allows.
TOLERANCE = 0.15
# KL(q || p) moves a mean by at most sqrt(2 KL) sds (Talagrand; exact for Gaussians), and a
# sd that is off by 15 % costs more than this.
MAX_GAP = TOLERANCE**2 / 2
# A weighted mean is known to 1 / sqrt(ESS) sds, a Gaussian's sd to 1 / sqrt(2 ESS); three of
# these are the tolerance.
MIN_ESS = (3 / TOLERANCE) ** 2
MIN_ESS_SD = MIN_ESS / 2
# Times fewer effective draws are a want of draws, not of weights, if more draws of the same guide
# had enough: a fit checks by up to four times what `Fit.draw` makes.
WANT = 6.0
# Draws that an advice asks for, at least, and times as many where there are enough of them.
ASKED, AGAIN = 4000, 4
# Below this divergence there is next to nothing to correct, so heavy-tailed weights are no
# reason for distrust. Well below MAX_GAP: part of such a tail goes unseen.
FLAT_GAP = 0.005
# Restarts whose means scatter by about a third of a sd.
MAX_RHAT = 1.05
# Restarts are apart if they differ by so many times what halves of one differ by.
FAR = 3.0
# A restart with less of the best one's evidence has failed: resampling all but drops it.
MIN_SHARE = 0.01
# Log evidences of restarts may differ by this much, and by four standard errors.
MAX_SPREAD = 0.05


def restarts(chains: np.ndarray) -> tuple[np.ndarray, list[Finding]]:
    """Restarts worth keeping, (chain), and a word on the others."""
    evidence = log_sum(chains)
    kept = evidence >= evidence.max() + math.log(MIN_SHARE)
    if kept.all():
        return kept, []
    names = ", ".join(str(chain) for chain in np.flatnonzero(~kept))
    reason = (
        f"Restart {names} found less than {MIN_SHARE:.0%} of the best restart's evidence. The "
        "numbers are those of the others; resampling all but drops its draws."
    )
    return kept, [Finding(RESAMPLE, reason)]


def weights(log_w: np.ndarray, outside: str = "") -> list[Finding]:
    """Weights of zero, constant weights.

    Args:
        log_w: Log weights, (S).
        outside: Why the density is zero at some draws, in a sentence.
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
    """Restarts that found different amounts of evidence."""
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
    """Whether KL(q || p) alone bounds the error of every moment."""
    value, error = gap(log_w)
    if value + 2 * error <= MAX_GAP:
        reason = f"KL(q || p) = {value:.2g}: no mean is off by {TOLERANCE} sd."
        return [Finding(TRUST, reason)]
    reason = (
        f"KL(q || p) = {value:.2g}: a mean of the plain draws may be off by up to "
        f"{math.sqrt(2 * value):.2g} sd. Diagnosing the draws, not only their weights, tells."
    )
    return [Finding(RESAMPLE, reason, TRUST if value - 2 * error <= MAX_GAP else RESAMPLE)]


def moments(c: Comparison) -> list[Finding]:
    """Whether plain and reweighted draws have the same means and standard deviations."""
    found = []
    if c.skipped:
        names = ", ".join(f"'{name}'" for name in c.skipped)
        found.append(Finding(TRUST, f"Not judged, for values that are not finite: {names}."))
    if not c.labels:
        return found
    shift, stretch = np.argmax(np.abs(c.shift)), np.argmax(np.abs(c.stretch))
    moved = (
        f"Reweighting moves the mean of {c.labels[shift]} by {c.shift[shift]:+.2g} sd and the sd "
        f"of {c.labels[stretch]} by {math.expm1(c.stretch[stretch]):+.1%}"
    )
    if not np.any(off(c)):
        return [*found, Finding(TRUST, f"{moved}; no other moves more.")]
    if np.any(off(c, -2.0)):
        return [*found, Finding(RESAMPLE, f"{moved}: the plain draws are off.")]
    i, j = np.argmax(np.abs(c.shift) + 2 * c.shift_se), np.argmax(c.stretch_se)
    reason = (
        f"{moved}. That the plain draws are off by less than {TOLERANCE} sd and {TOLERANCE:.0%} is "
        f"not certain: the errors are up to {c.shift_se[i]:.2g} sd and {c.stretch_se[j]:.0%}."
    )
    return [*found, Finding(RESAMPLE, reason, TRUST)]


def off(c: Comparison, errors: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Whether the plain mean, and the plain sd, of each scalar may be off by too much, (P), (P).

    Args:
        c: Plain against reweighted draws.
        errors: Standard errors to add; a number below zero asks whether they surely are off.
    """
    mean_error = np.abs(c.shift) + errors * c.shift_se
    sd_error = np.expm1(np.abs(c.stretch) + errors * c.stretch_se)
    return ~(mean_error <= TOLERANCE), ~(sd_error <= TOLERANCE)


def disagreement(c: Comparison) -> list[Finding]:
    """Restarts that lie in different places, plain or even reweighted."""
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


def apart(found: Distances) -> list[Finding]:
    """The two restarts that are farthest apart, if noise does not explain it."""
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
    """Too few effective draws, for some mean or sd, for resampled draws to be of use.

    Args:
        ess: 1 / sum of squared normalised weights.
        draws: Number of draws.
        c: Plain against reweighted draws.
        best: The best verdict that is left if all errors speak for the draws.
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
    """Weights with a heavy tail, which matter unless all the weights are nearly equal.

    Args:
        log_w: Log weights, (S).
        khat: Shape of their tail.
        threshold: Its limit for so many.
        so_far: The verdict without it.
        best: The same if all errors speak for the draws.
    """
    if khat < threshold:
        return []
    if so_far == TRUST and flat(log_w):
        largest = math.exp(log_w.max() - log_evidence(log_w).value)
        reason = (
            f"Trusted although Pareto k-hat {khat:.2f} is not below {threshold:.2f}: k-hat is the "
            "shape of the weights' tail, not its size, and the weights hardly vary. The "
            f"largest is {largest:.3g} times their mean and KL(q || p) = {gap(log_w).value:.2g}: "
            "there is nothing to correct."
        )
        return [Finding(TRUST, reason)]
    error = khat_error(khat, len(log_w))
    open_to = TRUST if open_tail(khat, len(log_w)) else DISTRUST
    if best == TRUST and flat(log_w, -2.0):
        open_to = TRUST
    if open_to == TRUST:
        reason = (
            f"Pareto k-hat {khat:.2f} is not below {threshold:.2f}, the limit for {len(log_w)} "
            f"draws, but its standard error is {error:.2g}: it may be."
        )
        return [Finding(DISTRUST, reason, TRUST)]
    reason = (
        f"Pareto k-hat {khat:.2f} is not below {threshold:.2f}: a few draws carry the weights, so "
        "neither resampling nor the evidence can be relied on. The guide is too poor an "
        "approximation, or the model does not suit the data: try a more flexible guide, more "
        "steps, or another parametrisation."
    )
    return [Finding(DISTRUST, reason)]


def open_tail(khat: float, draws: int) -> bool:
    """Whether k-hat may be below the limit of many draws, but for its error."""
    return khat - 2 * khat_error(khat, draws) < MOST_KHAT


def undecided(draws: int, strict: str, poor: bool, final: str, check: Check | None) -> list[str]:
    """Say that more draws are wanted where these are too few to tell, and how that was decided.

    Args:
        draws: How many there are.
        strict: The verdict of the draws alone.
        poor: Whether they show, whatever their errors, that the guide is poor: too few effective
            draws do not.
        final: The verdict, as `decided` gives it.
        check: What the check of the fit found.
    """
    few = draws < MIN_ESS and not poor
    unclear = final == DISTRUST and not poor
    words = []
    if few or unclear:
        what = "are few" if few else "are too few to tell on which side of a limit the guide is"
        words.append(f"{draws} draws {what}: draw more, for example fit.draw({_more(draws)}).")
    if check is not None:
        place = VERDICTS.index
        if place(final) > place(check.verdict):
            against = "are too few to be resampled" if unclear else "speak against it"
            words.append(f"{check}; these {draws} draws {against}.")
        elif place(final) < place(check.verdict):
            words.append(f"{check}; these are more draws, and decide.")
        elif few or final != strict:
            words.append(f"{check}; these {draws} draws do not speak against it.")
    elif unclear:
        words.append("Nothing here shows that the guide is poor, nor that it is good.")
    return [" ".join(words)] if words else []


def _more(draws: int) -> int:
    """How many draws to ask for where there are too few."""
    return ASKED if draws < ASKED else AGAIN * draws


def believable(log_w: np.ndarray, khat: float, threshold: float) -> Finding:
    """Whether the mean of the weights is known as well as its standard error says."""
    if khat < threshold:
        shown = f"k-hat {khat:.2f} is below {threshold:.2f}"
        if khat < 0.5:
            return Finding(TRUST, f"The weights can be averaged over: {shown}.")
        reason = (
            f"The weights can be averaged over, {shown}; but above 0.5 their variance may be "
            "infinite, and the standard errors too small."
        )
        return Finding(TRUST, reason)
    if flat(log_w):
        reason = f"The weights hardly vary: KL(q || p) = {gap(log_w).value:.2g}."
        return Finding(TRUST, reason)
    if open_tail(khat, len(log_w)):
        reason = (
            f"Pareto k-hat {khat:.2f} is not below {threshold:.2f}, but may be, by its standard "
            f"error of {khat_error(khat, len(log_w)):.2g}: draw more, for example "
            f"fit.draw({_more(len(log_w))}). The lower bounds hold all the same."
        )
        return Finding(DISTRUST, reason)
    reason = (
        f"Pareto k-hat {khat:.2f} is not below {threshold:.2f}: the mean weight rests on a few "
        "draws, and the evidence is probably higher. The lower bounds hold all the same."
    )
    return Finding(DISTRUST, reason)


def flat(log_w: np.ndarray, errors: float = 2.0) -> bool:
    """Whether the weights vary so little that there is next to nothing to correct.

    Args:
        log_w: Log weights, (S).
        errors: Standard errors of KL(q || p) to add.
    """
    value, error = gap(log_w)
    return value + errors * error <= FLAT_GAP


def priors(improper: Sequence[str]) -> list[Finding]:
    """Priors without which there is no evidence."""
    if not improper:
        return []
    names = ", ".join(f"'{name}'" for name in improper)
    reason = (
        f"No evidence: the prior of {names} is improper. The ELBO is that of a density without a "
        "normaliser: it compares guides for this model, and nothing else."
    )
    return [Finding(TRUST, reason)]

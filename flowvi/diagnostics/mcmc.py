"""The verdict on draws of Markov chains, from convergence and effective sample size."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from flowvi.compat import arviz_stats as stats
from flowvi.diagnostics import finding
from flowvi.diagnostics.finding import DISTRUST, TRUST, Finding
from flowvi.diagnostics.moments import Axes, blocks
from flowvi.diagnostics.verdict import Diagnosis

# Vehtari et al. (2021), section 4.
MAX_RHAT = 1.01
MIN_ESS = 400
# Largest share of divergent draws: a few are noise, more mark a region that was not explored.
MAX_DIVERGENT = 0.002


def diagnose_chains(
    values: Mapping[str, np.ndarray],
    diverging: np.ndarray,
    title: str = "",
    missed: Sequence[str] = (),
    axes: Axes | None = None,
) -> Diagnosis:
    """Judge draws of Markov chains: R-hat, bulk and tail ESS, divergences.

    They are trusted if every scalar has R-hat < 1.01 and bulk and tail ESS >= 400,
    and if at most 2 in 1000 draws ended a divergent trajectory. k-hat, ELBO and
    evidence need weights, and are NaN.

    Args:
        values: Arrays (chain, draw, ...) by name.
        diverging: Whether a draw ended a divergent trajectory, (chain, draw).
        title: Description of the sampled density.
        missed: Known parts of the posterior that the chains miss, in sentences.
        axes: Labels of the elements of the values, for the reasons.

    References:
        Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021),
        "Rank-normalization, folding, and localization", arXiv:1903.08008.
    """
    labels, rhat, bulk, tail = _convergence(values, axes)
    divergent = int(np.sum(diverging))
    worst, least = int(np.argmax(rhat)), int(np.argmin(np.minimum(bulk, tail)))
    ess = float(min(bulk[least], tail[least]))
    found = [
        _agreement(labels[worst], float(rhat[worst])),
        _effective(labels[least], ess),
        *_divergences(divergent, diverging.size),
        *(Finding(DISTRUST, sentence) for sentence in missed),
    ]
    none = (math.nan,) * 6
    return Diagnosis(
        finding.verdict(found),
        finding.reasons(found),
        math.nan,
        math.nan,
        ess,
        diverging.size,
        *none,
        title=title,
        rhat=float(rhat[worst]),
        divergences=divergent,
    )


def _convergence(
    values: Mapping[str, np.ndarray],
    axes: Axes | None,
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Labels, R-hat, bulk and tail ESS of every scalar that varies."""
    labels: list[str] = []
    rows = []
    for name, indices, block in blocks(values, axes):
        for index, x in zip(indices, np.moveaxis(block, -1, 0), strict=True):
            if np.isfinite(x).all() and np.ptp(x) == 0:
                continue
            labels.append(name + index)
            rows.append([stats.rhat(x), stats.ess(x, "bulk"), stats.ess(x, "tail")])
    rhat, bulk, tail = np.transpose(np.asarray(rows, dtype=np.float64))
    # A value that cannot be computed counts as not converged.
    return labels, np.nan_to_num(rhat, nan=np.inf), np.nan_to_num(bulk), np.nan_to_num(tail)


def _agreement(label: str, rhat: float) -> Finding:
    if rhat < MAX_RHAT:
        return Finding(TRUST, f"The chains agree: R-hat is at most {rhat:.3f} ({label}).")
    reason = (
        f"R-hat {rhat:.3f} of {label} is not below {MAX_RHAT}: the chains have not found the same "
        "posterior. Run them for longer, or fit a better guide first."
    )
    return Finding(DISTRUST, reason)


def _effective(label: str, ess: float) -> Finding:
    if ess >= MIN_ESS:
        return Finding(TRUST, f"At least {ess:.0f} effective draws, in bulk and tails ({label}).")
    reason = (
        f"Only {ess:.0f} effective draws of {label} in bulk or tails, where {MIN_ESS} are needed: "
        "draw more."
    )
    return Finding(DISTRUST, reason)


def _divergences(divergent: int, draws: int) -> list[Finding]:
    if not divergent:
        return []
    verdict = DISTRUST if divergent > MAX_DIVERGENT * draws else TRUST
    reason = (
        f"{divergent} of {draws} trajectories diverged: the chains may keep out of a narrow part "
        "of the posterior. Fit a better guide first, or raise target_accept."
    )
    return [Finding(verdict, reason)]

"""The log evidence, from below, in the middle and from above, and whether to believe it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from flowvi.diagnostics import observe
from flowvi.diagnostics.importance import (
    Bounds,
    Estimate,
    as_chains,
    debiased,
    iw_bounds,
    khat_threshold,
    log_evidence,
    psis,
    smoothed_evidence,
)

LADDER = (1, 10, 100, 1000)
# Chance that a certain bound is wrong.
RISK = 0.05
# Parts of the draws behind the sharper of the two certain bounds.
PARTS = 20
# Blocks that a debiased bound needs for its standard error.
BLOCKS = 30


@dataclass(frozen=True)
class Evidence:
    """The log evidence and what bounds it.

    Attributes:
        reliable: Whether the estimates of the evidence can be relied on. The
            bounds hold in any case.
        log_evidence, log_evidence_se: Log of the mean weight, which is unbiased.
        smoothed, smoothed_se: The same from Pareto-smoothed weights.
        debiased, debiased_se: L_K + CV^2 / 2K: a bound without its leading bias.
        bounds: The ELBO (K = 1) and importance-weighted bounds L_K.
        certain: Lower bound that holds with probability 0.95, whatever the
            guide: log mean weight - log 20, by Markov's inequality.
        certain_parts: As certain, and sharper: the smallest log mean weight of
            20 equal parts of the draws, less log(20) / 20.
        eubo, eubo_se: Upper bound E_p[log w], from draws of the posterior; NaN without.
        khat, khat_threshold: Pareto shape of the weights' tail, and its limit.
        draws: Number of weights.
        reasons: Why the estimates can or cannot be relied on.
        title: What was fitted.
    """

    reliable: bool
    log_evidence: float
    log_evidence_se: float
    smoothed: float
    smoothed_se: float
    debiased: float
    debiased_se: float
    bounds: Bounds
    certain: float
    certain_parts: float
    eubo: float
    eubo_se: float
    khat: float
    khat_threshold: float
    draws: int
    reasons: tuple[str, ...] = ()
    title: str = ""

    def __str__(self) -> str:
        judged = "can be relied on" if self.reliable else "do not rely on it"
        value = _plus_minus(self.log_evidence, self.log_evidence_se)
        lines = [f"Log evidence {value}: {judged}", *([self.title] if self.title else [])]
        lines += [
            f"  {name:<22} {number:>12}    {note}".rstrip() for name, number, note in _rows(self)
        ]
        return "\n".join([*lines, *(f"  - {reason}" for reason in self.reasons)])


def evidence(
    log_weights: ArrayLike,
    posterior_log_weights: ArrayLike | None = None,
    *,
    particles: Sequence[int] = LADDER,
    doubts: Sequence[str] = (),
    title: str = "",
) -> Evidence:
    """Estimate and bound the log evidence from log weights.

    Restarts that failed are left out, as in `diagnose`, except from the
    certain bounds, which would not be certain if draws were chosen.

    Args:
        log_weights: log p - log q of draws of the guide, (draw) or (chain, draw).
        posterior_log_weights: The same at draws of the posterior, for the upper bound.
        particles: Numbers of particles K of the lower bounds.
        doubts: What else speaks against the estimates, in sentences.
        title: What was fitted.

    References:
        Burda, Grosse and Salakhutdinov (2016), arXiv:1509.00519: L_K.
        Nowozin (2018), "Debiasing evidence approximations", ICLR: the bias of L_K.
        Gogate, Bidyuk and Dechter (2007), "Studies in lower bounding probability
        of evidence using the Markov inequality", UAI: both certain bounds.
    """
    chains = as_chains(log_weights)
    kept, found = observe.restarts(chains)
    log_w = chains[kept].ravel()
    smooth = psis(log_w)
    threshold = khat_threshold(log_w.size)
    found += observe.evidences(chains[kept])
    against = [*doubts, *(f.reason for f in found)]
    believed = observe.believable(log_w, smooth.khat, threshold)
    middle = log_evidence(log_w)
    above = Estimate(math.nan, math.nan)
    if posterior_log_weights is not None:
        above = _eubo(as_chains(posterior_log_weights))
        against += _contradiction(middle, above)
    blocks = [k for k in particles if len(log_w) >= BLOCKS * k]
    return Evidence(
        believed.verdict == observe.TRUST
        and not (doubts or observe.verdict(found) == observe.DISTRUST),
        *middle,
        *smoothed_evidence(log_w, smooth),
        *debiased(log_w, max(blocks, default=1)),
        iw_bounds(log_w, particles),
        *_certain(chains),
        *above,
        smooth.khat,
        threshold,
        log_w.size,
        (*against, believed.reason),
        title,
    )


def _certain(chains: np.ndarray) -> tuple[float, float]:
    """Lower bounds on the log evidence, each wrong with probability 0.05 at most.

    The mean of any weights exceeds c times the evidence with probability 1 / c
    at most; all of n independent means do with probability c^-n at most.
    """
    whole = log_evidence(chains.ravel()).value + math.log(RISK)
    parts = np.array_split(chains, PARTS, axis=1)
    least = min(log_evidence(part.ravel()).value for part in parts)
    return whole, least + math.log(RISK) / PARTS


def _eubo(chains: np.ndarray) -> Estimate:
    """Mean log weight of posterior draws, whose error allows for their autocorrelation."""
    import arviz as az

    effective = float(az.ess(chains, method="mean"))
    return Estimate(float(chains.mean()), float(chains.std(ddof=1) / math.sqrt(effective)))


def _contradiction(middle: Estimate, above: Estimate) -> list[str]:
    """An upper bound that is none, because its draws are not of the whole posterior."""
    if above.value >= middle.value - 4 * math.hypot(middle.se, above.se):
        return []
    return [
        f"The upper bound {above.value:.3f} lies below the estimate: the posterior draws behind "
        "it do not cover all of the posterior, or the weights are wrong."
    ]


def _rows(e: Evidence) -> list[tuple[str, str, str]]:
    rows = [
        ("at least (95 %)", f"{e.certain:.4f}", "certain: Markov's inequality on the mean weight"),
        ("", f"{e.certain_parts:.4f}", f"certain: the same on {PARTS} parts of the draws"),
    ]
    for particles, bound, se in e.bounds:
        name = "ELBO" if particles == 1 else f"L_{particles}"
        missing = f"needs at least {particles} draws"
        note = missing if math.isnan(bound) else _error(se)
        rows.append((f"{name} (lower bound)", "-" if math.isnan(bound) else f"{bound:.4f}", note))
    rows += [
        ("debiased", f"{e.debiased:.4f}", _error(e.debiased_se)),
        ("smoothed", f"{e.smoothed:.4f}", _error(e.smoothed_se)),
        ("log mean weight", f"{e.log_evidence:.4f}", _error(e.log_evidence_se)),
    ]
    if not math.isnan(e.eubo):
        rows.append(("EUBO (upper bound)", f"{e.eubo:.4f}", _error(e.eubo_se)))
    return rows


def _error(se: float) -> str:
    return "+- unknown" if math.isnan(se) else f"+- {se:.2g}"


def _plus_minus(value: float, se: float) -> str:
    return f"{value:.3f} {_error(se)}"

"""Estimates of the log evidence with lower and upper bounds, and their reliability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from flowvi.diagnostics import finding, findings
from flowvi.diagnostics.bridge_sampling import bridge_evidence, eubo, with_bridge
from flowvi.diagnostics.finding import DISTRUST, TRUST, Finding
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
    with_tail,
)
from flowvi.runtime.display import Displayed

LADDER = (1, 10, 100, 1000)
# Probability that a certain bound is wrong.
RISK = 0.05
# Number of parts of the draws for the sharper of the two certain bounds.
PARTS = 20
# Least number of blocks for the standard error of a debiased bound.
BLOCKS = 30
# Largest difference of two estimates, in standard errors.
ERRORS = 3.0
CHAINS = Finding(TRUST, "The chains are not trusted: neither are the bridge and the upper bound.")


class RowEvidence(NamedTuple):
    """The log evidence of each row, (R) each.

    Attributes:
        labels: Labels of the rows.
        log_evidence, log_evidence_se: The estimate, without its leading bias.
        reliable: Whether the estimate is reliable.
    """

    labels: tuple[str, ...]
    log_evidence: np.ndarray
    log_evidence_se: np.ndarray
    reliable: np.ndarray


@dataclass(frozen=True, repr=False)
class Evidence(Displayed):
    """The log evidence, with bounds.

    Attributes:
        reliable: Whether the estimates of the evidence are reliable. The bounds
            hold in any case.
        log_evidence, log_evidence_se: The best estimate: the bridge where there are
            trusted draws of the posterior, or short chains of the fit; else the log mean weight.
        mean_weight, mean_weight_se: Log of the mean weight, which is unbiased. The error
            includes an estimate of the unobserved tail.
        smoothed, smoothed_se: Log of the mean Pareto-smoothed weight.
        debiased, debiased_se: L_K + CV^2 / 2K: a bound without its leading bias.
        bridge, bridge_se: Estimate from draws of guide and posterior; NaN without the latter.
        bounds: The ELBO (K = 1) and importance-weighted bounds L_K.
        certain: Lower bound that holds with probability 0.95, whatever the
            guide: log mean weight - log 20, by Markov's inequality.
        certain_parts: A sharper bound with the same probability: the smallest log mean
            weight of 20 equal parts of the draws, less log(20) / 20.
        eubo, eubo_se: Upper bound E_p[log w], from draws of the posterior; NaN without such draws.
        khat, khat_threshold: Pareto shape of the weights' tail, and its limit.
        draws: Number of weights.
        reasons: Reasons for the value of `reliable`.
        title: Description of the fit.
        rows: The evidence of each row, if there is a row axis. The other attributes are then
            sums over rows, the largest k-hat, and the number of draws of a row.
    """

    reliable: bool
    log_evidence: float
    log_evidence_se: float
    mean_weight: float
    mean_weight_se: float
    smoothed: float
    smoothed_se: float
    debiased: float
    debiased_se: float
    bridge: float
    bridge_se: float
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
    rows: RowEvidence | None = None

    def __str__(self) -> str:
        judged = "can be relied on" if self.reliable else "do not rely on it"
        value = f"{self.log_evidence:.3f} {_error(self.log_evidence_se)}"
        of = "" if self.rows is None else f" of {len(self.rows.labels)} rows"
        lines = [f"Log evidence{of} {value}: {judged}", *([self.title] if self.title else [])]
        lines += [
            f"  {name:<22} {number:>12}    {note}".rstrip() for name, number, note in _rows(self)
        ]
        return "\n".join([*lines, *(f"  - {reason}" for reason in self.reasons)])


def evidence(
    log_weights: ArrayLike,
    posterior_log_weights: ArrayLike | None = None,
    *,
    trusted: bool = True,
    short: Estimate | None = None,
    particles: Sequence[int] = LADDER,
    doubts: Sequence[str] = (),
    title: str = "",
) -> Evidence:
    """Estimate and bound the log evidence from log weights.

    Failed restarts are left out, as in `diagnose`. The certain bounds use all
    restarts, because a selection of draws would invalidate them.

    Args:
        log_weights: log p - log q of draws of the guide, (draw) or (chain, draw).
        posterior_log_weights: Log weights at draws of the posterior, for the upper bound.
        trusted: Whether the posterior draws are trusted.
        short: The bridge by short chains of the fit, for the estimate where there are no other
            draws of the posterior.
        particles: Numbers of particles K of the lower bounds.
        doubts: Further reasons against the estimates, in sentences.
        title: Description of the fit.

    References:
        Burda, Grosse and Salakhutdinov (2016), arXiv:1509.00519: L_K.
        Nowozin (2018), "Debiasing evidence approximations", ICLR: the bias of L_K.
        Gogate, Bidyuk and Dechter (2007), "Studies in lower bounding probability
        of evidence using the Markov inequality", UAI: both certain bounds.
    """
    chains = as_chains(log_weights)
    kept, found = findings.restarts(chains)
    log_w = chains[kept].ravel()
    smooth, threshold = psis(log_w), khat_threshold(log_w.size)
    best = middle = with_tail(log_evidence(log_w), log_w, smooth.khat)
    above = bridge = Estimate(math.nan, math.nan)
    judged = [
        *findings.evidences(chains[kept]),
        findings.judge_mean_weight(log_w, smooth.khat, threshold),
    ]
    if posterior_log_weights is not None:
        posterior = as_chains(posterior_log_weights)
        above, bridge = eubo(posterior), bridge_evidence(log_w, posterior)
        unlike = _compare_estimates(middle, bridge, above) if trusted else [CHAINS]
        if trusted and all(f.verdict == TRUST for f in unlike):
            # The error of the bridge is finite for any tail of the weights.
            best, judged = bridge, [Finding(TRUST, finding.reason) for finding in judged]
        judged += unlike
    elif short is not None:
        bridge, best = short, with_bridge(middle, short)
        judged += _compare_estimates(middle, short, above)
    found += [*judged, *(Finding(DISTRUST, doubt) for doubt in doubts)]
    blocks = [k for k in particles if len(log_w) >= BLOCKS * k]
    return Evidence(
        finding.verdict(found) != DISTRUST,
        *best,
        *middle,
        *smoothed_evidence(log_w, smooth),
        *debiased(log_w, max(blocks, default=1)),
        *bridge,
        iw_bounds(log_w, particles),
        *_markov_bounds(chains),
        *above,
        smooth.khat,
        threshold,
        log_w.size,
        finding.reasons(found),
        title,
    )


def _markov_bounds(chains: np.ndarray) -> tuple[float, float]:
    """Lower bounds on the log evidence, each wrong with probability at most 0.05.

    The mean of any weights exceeds c times the evidence with probability at most
    1 / c; all of n independent means do with probability at most c^-n.
    """
    whole = log_evidence(chains.ravel()).value + math.log(RISK)
    parts = np.array_split(chains, PARTS, axis=1)
    least = min(log_evidence(part.ravel()).value for part in parts)
    return whole, least + math.log(RISK) / PARTS


def _compare_estimates(middle: Estimate, bridge: Estimate, above: Estimate) -> list[Finding]:
    """Compare estimates to detect mass that the guide's own weights do not show.

    A guide may miss a tail without a heavy weight among its draws.
    """
    error = ERRORS * math.hypot(middle.se, bridge.se)
    values = f"{bridge.value:.3f} by bridge sampling, {middle.value:.3f} by the weights alone"
    if bridge.value - middle.value > error:
        reason = f"The guide leaves out a part of the posterior: log evidence {values}."
        return [Finding(TRUST, reason)]
    if middle.value - bridge.value > error or middle.value - above.value > ERRORS * above.se:
        reason = f"The chains leave out a part of the posterior: log evidence {values}."
        return [Finding(DISTRUST, reason)]
    return []


def _rows(e: Evidence) -> list[tuple[str, str, str]]:
    rows = [
        ("at least (95 %)", f"{e.certain:.4f}", "by Markov's inequality for the mean weight"),
        ("", f"{e.certain_parts:.4f}", f"the same for {PARTS} parts of the draws"),
    ]
    for particles, bound, se in e.bounds:
        name = "ELBO" if particles == 1 else f"L_{particles}"
        missing = f"needs at least {particles} draws"
        note = missing if math.isnan(bound) else _error(se)
        rows.append((f"{name} (lower bound)", "-" if math.isnan(bound) else f"{bound:.4f}", note))
    rows += [
        ("debiased", f"{e.debiased:.4f}", _error(e.debiased_se)),
        ("smoothed", f"{e.smoothed:.4f}", _error(e.smoothed_se)),
        ("log mean weight", f"{e.mean_weight:.4f}", _error(e.mean_weight_se)),
    ]
    if not math.isnan(e.eubo):
        rows.append(("bridge", f"{e.bridge:.4f}", _error(e.bridge_se)))
        rows.append(("EUBO (upper bound)", f"{e.eubo:.4f}", _error(e.eubo_se)))
    return rows


def _error(se: float) -> str:
    return "+- unknown" if math.isnan(se) else f"+- {se:.2g}"

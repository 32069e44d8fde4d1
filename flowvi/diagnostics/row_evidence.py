"""The log evidence of each row, and of all rows together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from flowvi.diagnostics import finding
from flowvi.diagnostics.evidence import (
    BLOCKS,
    LADDER,
    PARTS,
    RISK,
    Evidence,
    RowEvidence,
)
from flowvi.diagnostics.finding import DISTRUST, TRUST, Finding
from flowvi.diagnostics.findings import judge_mean_weight
from flowvi.diagnostics.importance import (
    Psis,
    check_weights,
    debiased_of_rows,
    iw_bounds_of_rows,
    khat_threshold,
    psis_of_rows,
    smoothed_evidence,
)
from flowvi.diagnostics.pareto import log_sum
from flowvi.diagnostics.rows import (
    clearly_above_limit,
    evidence_of_each,
    exceed_noise,
    name_rows,
    total,
)


def evidence_of_rows(
    log_weights: np.ndarray,
    labels: Sequence[str],
    *,
    particles: Sequence[int] = LADDER,
    doubts: Sequence[str] = (),
    title: str = "",
) -> Evidence:
    """Estimate and bound the log evidence of each row, and their sum.

    The draws of rows are independent. Variances therefore add, and the product of the mean
    weights is unbiased for the product of the evidences: both certain bounds hold for the sum.

    Args:
        log_weights: log p - log q of draws of the guide, (chain, draw, row).
        labels: Labels of the rows.
        particles: Numbers of particles K of the lower bounds.
        doubts: Further reasons against the estimates, in sentences.
        title: Description of the fit.
    """
    check_weights(log_weights)
    log_w = log_weights.reshape(-1, log_weights.shape[-1]).astype(np.float64)
    draws, rows = log_w.shape
    seen = np.isfinite(log_w).any(0)
    smooth, threshold = psis_of_rows(log_w.T), khat_threshold(draws)
    khat = np.where(seen, smooth.khat, np.inf)
    values, errors = np.full(rows, -np.inf), np.full(rows, np.nan)
    values[seen], errors[seen] = evidence_of_each(log_w.T[seen], khat[seen])
    least = max((k for k in particles if draws >= BLOCKS * k), default=1)
    others = np.full((4, rows), np.nan)
    others[2:, seen] = debiased_of_rows(log_w[:, seen], least)
    found = [Finding(DISTRUST, "No draw has positive density.")] * rows
    for n in np.flatnonzero(seen):
        own = log_w[:, n]
        others[:2, n] = smoothed_evidence(own, Psis(smooth.log_weights[n], khat[n]))
        found[n] = judge_mean_weight(own, khat[n], threshold)
    failed = np.array([f.verdict == DISTRUST for f in found])
    judged = _judged(labels, found, failed, khat, draws)
    judged += [Finding(DISTRUST, doubt) for doubt in doubts]
    best = total(values, errors)
    nothing = (math.nan, math.nan)
    return Evidence(
        finding.verdict(judged) != DISTRUST,
        *best,
        *best,
        *total(*others[:2]),
        *total(*others[2:]),
        *nothing,
        iw_bounds_of_rows(log_w, particles),
        *_markov_bounds(log_w),
        *nothing,
        float(khat.max()),
        threshold,
        draws,
        tuple(f.reason for f in judged),
        title,
        RowEvidence(tuple(map(str, labels)), values, errors, ~failed),
    )


def _judged(
    labels: Sequence[str],
    found: Sequence[Finding],
    failed: np.ndarray,
    khat: np.ndarray,
    draws: int,
) -> list[Finding]:
    """Findings on the reliability of the rows' mean weights."""
    if not failed.any():
        return [Finding(TRUST, f"The weights of all {len(labels)} rows can be averaged over.")]
    sure = clearly_above_limit(khat, draws)
    verdict = DISTRUST if exceed_noise(failed, sure) else TRUST
    worst = int(np.argmax(np.where(failed, khat, -np.inf)))
    reasons = [
        name_rows(labels, failed, khat, "not to be relied on"),
        f"Row {labels[worst]}: {found[worst].reason}",
    ]
    if verdict == TRUST:
        reasons.append(f"So few rows can fail by the errors of {draws} draws alone.")
    return [Finding(verdict, reason) for reason in reasons]


def _markov_bounds(log_w: np.ndarray) -> tuple[float, float]:
    """Lower bounds on the log evidence of all rows, each wrong with probability 0.05 at most."""
    parts = [log_w, *np.array_split(log_w, PARTS)]
    whole, *each = (float((log_sum(p.T) - math.log(len(p))).sum()) for p in parts)
    return whole + math.log(RISK), min(each) + math.log(RISK) / PARTS

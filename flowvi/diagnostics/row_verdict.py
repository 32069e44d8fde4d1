"""Verdicts on draws with a row axis: of each row, and of all rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from flowvi.diagnostics import finding
from flowvi.diagnostics.finding import DISTRUST, RESAMPLE, TRUST, Finding
from flowvi.diagnostics.findings import AGAIN, ASKED, priors
from flowvi.diagnostics.importance import (
    check_weights,
    khat_threshold,
    psis_of_rows,
)
from flowvi.diagnostics.moments import Axes
from flowvi.diagnostics.rows import (
    Rows,
    clearly_above_limit,
    evidence_of_each,
    exceed_noise,
    name_rows,
    total,
)
from flowvi.diagnostics.verdict import Diagnosis, judge

NOWHERE = "No draw has positive density under the model."


def diagnose_rows(
    log_weights: np.ndarray,
    values: Mapping[str, np.ndarray],
    labels: Sequence[str],
    title: str = "",
    missed: Sequence[str] = (),
    axes: Axes | None = None,
    doubts: Sequence[str] = (),
    improper: Sequence[str] = (),
) -> Diagnosis:
    """Judge the draws of each row, and of all rows together.

    The verdict of a row is that of `diagnose` on its draws alone. Over all rows it is "do not
    trust" if an untrusted row has a k-hat significantly above the limit
    (`clearly_above_limit`), or if more than 5 % of the rows are untrusted for any reason.
    Otherwise it is "trust the resampled draws" if the plain draws of a row are off by more than
    two standard errors, or if more than 5 % of the rows do not have the verdict "trust".

    Args:
        log_weights: (chain, draw, row).
        values: Arrays (chain, draw, row, ...) by name, the latent vectors among them.
        labels: Labels of the rows.
        title: Description of the fit, in one line.
        missed: Known parts of the posterior that the draws miss, in sentences.
        axes: Labels of the elements of the values of one row.
        doubts: Reasons against the plain draws other than the weights, in sentences.
        improper: Sites with improper priors: there is no evidence then.
    """
    log_w = np.asarray(log_weights, dtype=np.float64)
    check_weights(log_w)
    judged = list(_each(log_w, values, axes))
    rows = _table(judged, log_w, labels)
    known = [Finding(DISTRUST, sentence) for sentence in missed]
    known += [Finding(RESAMPLE, sentence) for sentence in doubts]
    found = _findings(rows)
    first, *_ = judged
    elbo = total(rows.elbo, rows.elbo_se)
    gap = total(np.array([d.gap for d in judged]), np.array([d.gap_se for d in judged]))
    evidence = (math.nan, math.nan) if improper else total(rows.log_evidence, rows.log_evidence_se)
    return Diagnosis(
        finding.verdict([*known, *found]),
        tuple(f.reason for f in [*known, *found, *priors(improper)]),
        float(rows.khat.max()),
        first.khat_threshold,
        float(rows.ess.min()),
        first.draws,
        *elbo,
        *gap,
        *evidence,
        title=title,
        rows=rows,
    )


def _each(
    log_w: np.ndarray, values: Mapping[str, np.ndarray], axes: Axes | None
) -> Iterator[Diagnosis]:
    """The verdict on the draws of each row."""
    chains, draws, count = log_w.shape
    smooth = psis_of_rows(log_w.reshape(-1, count).T)
    for n in range(count):
        own = log_w[..., n]
        if np.isfinite(own).any():
            arrays = {name: array[:, :, n] for name, array in values.items()}
            yield judge(own, arrays, smooth.row(n), axes, explain=False)
            continue
        size, none = chains * draws, (-math.inf, math.nan)
        limit = khat_threshold(size)
        numbers = (math.inf, limit, 0.0, size, *none, math.inf, math.nan, *none)
        yield Diagnosis(DISTRUST, (NOWHERE,), *numbers, at_best=DISTRUST)


def _table(judged: Sequence[Diagnosis], log_w: np.ndarray, labels: Sequence[str]) -> Rows:
    khat = np.array([d.khat for d in judged])
    dead = ~np.isfinite(log_w).any((0, 1))
    values, errors = np.full(len(khat), -np.inf), np.full(len(khat), np.nan)
    flat = log_w.reshape(-1, len(khat)).T
    values[~dead], errors[~dead] = evidence_of_each(flat[~dead], khat[~dead])
    return Rows(
        tuple(map(str, labels)),
        np.array([d.verdict for d in judged]),
        np.array([d.at_best for d in judged]),
        khat,
        np.array([d.ess for d in judged]),
        np.array([d.elbo for d in judged]),
        np.array([d.elbo_se for d in judged]),
        values,
        errors,
        judged[0].draws,
    )


def _findings(rows: Rows) -> list[Finding]:
    """Findings over all rows, the least trusted rows first."""
    failed, off = rows.verdict == DISTRUST, rows.verdict == RESAMPLE
    sure = failed & clearly_above_limit(rows.khat, rows.draws)
    found = []
    if failed.any():
        verdict = DISTRUST if exceed_noise(failed, sure) else TRUST
        badness = np.where(sure, np.inf, rows.khat)
        worst = int(np.argmax(np.where(failed, badness, -np.inf)))
        middle = float(np.median(rows.khat))
        own = (
            f"Row {rows.labels[worst]} has Pareto k-hat {rows.khat[worst]:.2f}, where half of all "
            f"rows are below {middle:.2f}: its guide is too poor. The others have verdicts of "
            "their own in diagnosis.rows."
        )
        reasons = [
            name_rows(rows.labels, failed, badness, "not to be trusted"),
            own if sure.any() else _borderline(rows, verdict == TRUST),
        ]
        found += [Finding(verdict, reason) for reason in reasons]
    if off.any():
        certain = off & (rows.at_best == RESAMPLE)
        verdict = RESAMPLE if exceed_noise(off | failed, certain) else TRUST
        reason = name_rows(rows.labels, off, rows.khat, "to be resampled")
        found.append(Finding(verdict, reason))
    return found


def _borderline(rows: Rows, few: bool) -> str:
    """Sentence on rows that fail by no more than the errors of their numbers; else empty."""
    if few:
        return (
            f"So few rows can fail by the errors of {rows.draws} draws alone: the verdict is that "
            "of the other rows. To tell, draw more of these, for example "
            "fit.draw(4000, rows=[...])."
        )
    more = max(ASKED, AGAIN * rows.draws)
    return (
        f"{rows.draws} draws of a row are too few to tell: more of them, such as fit.draw({more}), "
        "may say otherwise."
    )

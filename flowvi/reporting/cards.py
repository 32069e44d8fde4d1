"""Cards of results in notebooks: the verdict, its reasons, a table and one small picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from functools import singledispatch
from html import escape
from typing import Any

import numpy as np

from flowvi.amortized.guide import AmortizedGuide
from flowvi.amortized.table import Fits
from flowvi.analysis.compare import ModelComparison
from flowvi.diagnostics import MIN_DRAWS, VERDICTS, Diagnosis, Evidence
from flowvi.diagnostics.calibration import LEVEL, Calibration
from flowvi.draws.diagnose import diagnose
from flowvi.draws.draws import Draws, checked
from flowvi.draws.scalars import recommended, table
from flowvi.draws.selection import first_scalars
from flowvi.fitting.result import AnyFit, Fit, NestedFit, RowFit
from flowvi.plots import plot_epochs, plot_evidence, plot_held_out, plot_marginals, plot_sbc
from flowvi.reporting.amortized import fits_card
from flowvi.reporting.decimals import decimals, even
from flowvi.reporting.fragments import (
    TONES,
    bars,
    bullets,
    cells,
    details,
    frame,
    grid,
    paragraph,
    scale,
    small_picture,
)

# Rows of the table, and scalars in the picture.
ROWS, SHOWN = 12, 6
# Draws behind the card of a fit.
DRAWS = 1000
# Largest number of numbers in the table of draws behind the card of a fit.
LARGEST = 4_000_000


@singledispatch
def card(result: Any) -> str:
    """HTML of the card of a result; names of the user are escaped.

    Args:
        result: A fit, draws, a diagnosis, an evidence, a comparison or a calibration.
    """
    return f"<pre>{escape(str(result))}</pre>"


@card.register
def _(draws: Draws) -> str:
    chains, each, *rows, dim = draws.z.shape
    kind = "resampled draws" if draws.resampled else "MCMC draws" if draws.mcmc else "draws"
    where = f" for each of {rows[0]:,} rows" if rows else ""
    about = f"{chains} &times; {each:,} {kind}{where} in {dim:,} dimensions"
    found = diagnose(draws) if draws.resampled or each >= MIN_DRAWS else None
    verdict = "not judged" if found is None else found.verdict
    reasons = ("There are too few draws to judge them.",) if found is None else found.reasons
    return frame(verdict, draws.title, [paragraph(about), bullets(reasons), *_of_draws(draws)])


@card.register
def _(fits: Fits) -> str:
    return fits_card(fits)


@card.register
def _(guide: AmortizedGuide) -> str:
    title, *lines = str(guide).split("\n")
    picture = small_picture(lambda: plot_held_out(guide.losses)) if len(guide.losses) else ""
    parts = [picture, details("What the training decided, and why", lines)]
    return frame("amortised", title, parts)


@card.register
def _(fit: AnyFit) -> str:
    title, *_ = str(fit).split("\n")
    check = checked(fit.meta)
    verdict = "not checked" if check is None else check.verdict
    parts = []
    if check is not None:
        parts.append(paragraph(escape(f"{check}.")))
    if isinstance(fit, NestedFit | RowFit):
        parts.append(small_picture(lambda: plot_epochs(fit.history)) if _trained(fit) else "")
    elif isinstance(fit, Fit) and DRAWS * fit.target.dim <= LARGEST:
        parts += _of_draws(fit.draw(DRAWS))
    parts.append(details("What the fit decided, and why", fit.log))
    return frame(verdict, title, parts)


@card.register
def _(found: Diagnosis) -> str:
    numbers = [(name, value, note) for name, value, note in found.numbers()]
    limit = found.khat_threshold
    line = scale("Pareto k-hat", found.khat, limit, 1.2, found.khat_se)
    if not math.isnan(found.rhat):
        line = scale("R-hat", found.rhat, 1.01, 1.1, math.nan, low=1.0)
    return frame(found.verdict, found.title, [bullets(found.reasons), grid(numbers), line])


@card.register
def _(found: Evidence) -> str:
    verdict = "can be relied on" if found.reliable else "do not rely on it"
    rows = [
        ("log evidence", f"{found.log_evidence:.3f}", f"± {found.log_evidence_se:.2g}"),
        *((f"bound, K = {b.particles}", f"{b.bound:.3f}", f"± {b.se:.2g}") for b in found.bounds),
        ("certain lower bound", f"{found.certain_parts:.3f}", "with probability 0.95"),
        ("Pareto k-hat", f"{found.khat:.2f}", f"limit {found.khat_threshold:.2f}"),
    ]
    rows = [row for row in rows if row[1] != "nan"]
    tone = TONES[VERDICTS[0 if found.reliable else 2]]
    parts = [bullets(found.reasons), grid(rows), small_picture(lambda: plot_evidence(found))]
    return frame(verdict, found.title or "Log evidence", parts, tone)


@card.register
def _(found: ModelComparison) -> str:
    first = found.models[0]
    title = str(found).split("\n")[0]
    header = ("model", "log evidence", "difference", "probability")
    rows = []
    for m in found.models:
        if math.isnan(m.log_evidence):
            rows.append((m.name, "none", "", ""))
            continue
        apart = f"{m.difference:.3f} ± {m.difference_se:.2g}" if m.difference else "0"
        value = f"{m.log_evidence:.3f} ± {m.log_evidence_se:.2g}"
        rows.append((m.name, value, apart, f"{m.probability:.3g}"))
    notes = [*(f"{m.name}: {m.note}" for m in found.models if m.note), *found.notes]
    known = {m.name: m.probability for m in found.models if not math.isnan(m.probability)}
    parts = [cells(header, rows), bars(known), bullets(notes)]
    if found.loo is not None:
        parts.append("<div>By leave-one-out prediction:</div>" + found.loo.to_html())
    clear = not math.isnan(first.log_evidence) and not notes
    return frame("compared", title, parts, TONES[VERDICTS[0 if clear else 1]])


@card.register
def _(found: Calibration) -> str:
    good = [name for name, p in found.uniform.items() if p >= LEVEL]
    title, *lines = str(found).split("\n")
    verdict = "not calibrated" if not good else "calibrated" if found.enough else "too few to tell"
    tone = TONES[VERDICTS[2 if not good else 0 if found.enough else 1]]
    parts = [paragraph(escape(title)), bullets([line.strip(" -") for line in lines])]
    parts.append(small_picture(lambda: plot_sbc(found)))
    return frame(verdict, "Simulation-based calibration", parts, tone)


def _of_draws(draws: Draws) -> Iterable[str]:
    """The table and the picture of the draws that the verdict recommends."""
    kept, word = recommended(draws)
    chosen = list(itertools.islice(first_scalars(kept), ROWS))
    if not chosen:
        return
    some = table(kept, chosen=chosen)
    low, high = some.columns[2:4]
    sds = some["sd"].to_numpy()
    places = decimals(sds)
    rows = []
    for label, line in some.iterrows():
        mean, sd, left, right = (
            even(line[c], line["sd"], places) for c in ("mean", "sd", low, high)
        )
        error = f"{line['mcse_mean']:.2g}"
        rows.append((str(label), mean, sd, f"{left} … {right}", error, f"{line['ess']:,.0f}"))
    count = sum(math.prod(value.shape[2:]) for value in kept.values.values())
    more = f"; draws.summary() has all {count:,} numbers" if count > len(rows) else ""
    header = ("", "mean", "sd", "94 % HDI", "MCSE", "ESS")
    yield cells(header, rows) + f"<small>Of the {word} draws{more}.</small>"
    labels = [one.label for one in chosen[:SHOWN]]
    yield small_picture(lambda: plot_marginals(kept, labels))


def _trained(fit: AnyFit) -> bool:
    return "epoch" in fit.history and bool(np.isfinite(fit.history["bound"]).any())

"""The page of an amortised guide, calibration first, and the card of many data sets."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from flowvi.amortized.guide import AmortizedGuide
from flowvi.amortized.table import Fits
from flowvi.diagnostics import VERDICTS
from flowvi.diagnostics.calibration import LEVEL, Calibration
from flowvi.plots import plot_coverage, plot_held_out, plot_recovery, plot_sbc
from flowvi.reporting.fragments import TONES, bullets, cells, details, frame, paragraph
from flowvi.reporting.pictures import data_uri, png
from flowvi.runtime.files import write_atomic

# Resolution of pictures, and lines of the table of data sets.
DPI, LINES = 110, 20
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:62em;margin:2em auto;padding:0 1em}"
    "img{max-width:100%}h2{margin-top:1.6em}table{border-collapse:collapse}"
)


def report_amortized(
    guide: AmortizedGuide,
    calibration: Calibration,
    out: str | os.PathLike[str],
    fits: Fits | None = None,
) -> Path:
    """Write a report on an amortised guide as one HTML file that includes its pictures.

    Args:
        guide: The guide.
        calibration: Its calibration, from ``flowvi.sbc(guide)``.
        out: The file to write.
        fits: Data sets that it was applied to.
    """
    tested = _head(calibration)
    parts = [
        f"<h1>{escape(guide.name)}: one guide for every data set</h1>",
        "<h2>Calibration</h2>",
        frame(*tested, [_pre(calibration)], TONES[VERDICTS[0 if tested[0] == "calibrated" else 2]]),
        paragraph(
            f"{calibration.trusted:.1%} of {len(calibration.plain)} simulated data sets are "
            "trusted without a fit of their own."
        ),
        _picture(lambda: plot_sbc(calibration), "Ranks of the true values"),
        _picture(lambda: plot_coverage(calibration), "Coverage of central intervals"),
    ]
    if calibration.recovery is not None:
        parts.append(_picture(lambda: plot_recovery(calibration), "True values and means"))
    if fits is not None:
        parts += ["<h2>Data sets</h2>", fits_card(fits)]
    parts += [
        "<h2>Training</h2>",
        _pre(guide),
        _picture(lambda: plot_held_out(guide.losses), "Held-out loss"),
        details("All facts", [f"{key}: {value}" for key, value in guide.meta.items()]),
    ]
    title = f"{escape(guide.name)}: calibration"
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    file = Path(out)
    write_atomic(file, page.encode())
    return file


def fits_card(fits: Fits) -> str:
    """The card of many data sets: how many are trusted, and a table of the first."""
    share = float(fits.trusted.mean()) if len(fits) else 0.0
    verdict = VERDICTS[0] if share == 1 else VERDICTS[1] if share > 0.5 else VERDICTS[2]
    header = ("", "verdict", "method", "k-hat", "effective", "log evidence")
    rows = [
        (
            str(i),
            line.verdict,
            line.method,
            f"{line.khat:.2f}",
            f"{line.ess:.0f}",
            f"{line.log_evidence:.3f}",
        )
        for i, line in enumerate(fits.lines[:LINES])
    ]
    left = len(fits) - LINES
    bad = [f"{i}: {line.reason}" for i, line in enumerate(fits.lines) if not line.trusted]
    more = f"and {left} more: fits.to_dataframe()" if left > 0 else ""
    parts = [cells(header, rows), paragraph(escape(more)), bullets(bad)]
    return frame(f"{share:.0%} trusted", fits.summary(), parts, TONES[verdict])


def _head(calibration: Calibration) -> tuple[str, str]:
    """A word and a title."""
    good = [name for name, p in calibration.uniform.items() if p >= LEVEL]
    word = "calibrated" if good else "not calibrated"
    return word, str(calibration).split("\n")[0]


def _pre(result: object) -> str:
    rest = (
        str(result).split("\n")[1:] if isinstance(result, Calibration) else str(result).split("\n")
    )
    return f"<pre>{escape(chr(10).join(rest))}</pre>"


def _picture(draw: Callable[[], Any], title: str) -> str:
    source = data_uri(png(draw, DPI))
    return f'<h3>{escape(title)}</h3><img alt="{escape(title)}" src="{source}">'


__all__: Sequence[str] = ["fits_card", "report_amortized"]

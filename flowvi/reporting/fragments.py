"""Parts of cards as HTML; texts of the user are escaped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from flowvi.diagnostics import VERDICTS
from flowvi.reporting.pictures import data_uri, png

# Reasons, and lines of a log.
REASONS, LOG = 6, 40
# Largest picture, in bytes, and its resolution.
LARGEST_PICTURE, DPI = 100_000, 80
TONES = dict(zip(VERDICTS, ("#2e7d4f", "#b07c12", "#b3382c"), strict=True))
GREY = "#6b7280"
STYLE = "max-width:60em;line-height:1.4;margin:.3em 0"
# Pages around a card may pad and align headings of rows otherwise than cells.
PLAIN = "text-align:left;padding:.1em .7em;vertical-align:baseline"
CELL = (
    "text-align:right;padding:.1em .7em;vertical-align:baseline;font-variant-numeric:tabular-nums"
)


def frame(verdict: str, title: str, parts: Iterable[str], tone: str = "") -> str:
    """A card with a verdict and a title above its parts."""
    colour = tone or TONES.get(verdict, GREY)
    badge = (
        f'<span style="background:{colour};color:#fff;border-radius:.3em;padding:.1em .6em;'
        f'margin-right:.7em;white-space:nowrap">{escape(verdict)}</span>'
    )
    head = f'<div style="margin-bottom:.3em">{badge}<b>{escape(title)}</b></div>'
    return f'<div style="{STYLE};border-left:4px solid {colour};padding-left:1em">{head}' + (
        "".join(part for part in parts if part) + "</div>"
    )


def paragraph(html: str) -> str:
    """A block of HTML."""
    return f"<div>{html}</div>"


def bullets(reasons: Sequence[str]) -> str:
    """Reasons as a list."""
    if not reasons:
        return ""
    shown = "".join(f"<li>{escape(reason)}</li>" for reason in reasons[:REASONS])
    left = len(reasons) - REASONS
    more = f"<li>and {left} more: print it</li>" if left > 0 else ""
    return f'<ul style="margin:.2em 0;padding-left:1.3em">{shown}{more}</ul>'


def details(summary: str, lines: Sequence[str]) -> str:
    """Lines that are shown on a click."""
    if not lines:
        return ""
    text = "\n".join(lines[:LOG]) + ("\n..." if len(lines) > LOG else "")
    style = "white-space:pre-wrap;margin:.2em 0"
    return (
        f'<details><summary>{summary}</summary><pre style="{style}">{escape(text)}</pre></details>'
    )


def grid(rows: Iterable[tuple[str, str, str]]) -> str:
    """Names, numbers and notes."""
    lines = "".join(
        f'<tr><th style="{PLAIN}">{escape(name)}</th>'
        f'<td style="{CELL}">{escape(value)}</td>'
        f'<td style="{PLAIN}">{escape(note)}</td></tr>'
        for name, value, note in rows
    )
    return f"<table><tbody>{lines}</tbody></table>"


def cells(header: Sequence[str], rows: Iterable[Sequence[str]], *, of_page: bool = False) -> str:
    """A table whose first column names its rows.

    Args:
        header: Headings of the columns.
        rows: Cells of each row.
        of_page: Whether the style sheet of a report applies, in place of styles of each cell.
    """
    head, first, cell = ("", "", "") if of_page else (CELL, PLAIN, CELL)
    body = "".join(
        f"<tr>{_cell('th', first, name)}{''.join(_cell('td', cell, text) for text in rest)}</tr>"
        for name, *rest in rows
    )
    columns = "".join(_cell("th", head, text) for text in header)
    table = '<table class="numbers">' if of_page else "<table>"
    return f"{table}<thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>"


def _cell(tag: str, style: str, text: str) -> str:
    opened = f'{tag} style="{style}"' if style else tag
    return f"<{opened}>{escape(text)}</{tag}>"


def scale(name: str, value: float, limit: float, high: float, se: float, low: float = 0.0) -> str:
    """A number on a line, green up to its limit and red beyond it."""
    if math.isnan(value):
        return ""
    width, height = 320, 34

    def place(x: float) -> float:
        return round(10 + (width - 20) * (min(max(x, low), high) - low) / (high - low), 1)

    bar = ""
    if math.isfinite(se) and math.isfinite(value):
        left, right = place(value - se), place(value + se)
        bar = f'<rect x="{left}" y="9" width="{right - left:.1f}" height="2" fill="currentColor"/>'
    good, bad = TONES[VERDICTS[0]], TONES[VERDICTS[2]]
    return (
        f'<svg width="{width}" height="{height}" role="img" '
        f'aria-label="{name} {value:.2f}, limit {limit:.2f}">'
        f'<rect x="10" y="6" width="{place(limit) - 10:.1f}" height="8" '
        f'fill="{good}" opacity=".35"/>'
        f'<rect x="{place(limit)}" y="6" width="{width - 10 - place(limit):.1f}" height="8" '
        f'fill="{bad}" opacity=".35"/>{bar}'
        f'<circle cx="{place(value)}" cy="10" r="5" fill="currentColor"/>'
        f'<text x="10" y="30" font-size="11" fill="currentColor">{name}</text>'
        f'<text x="{place(limit)}" y="30" font-size="11" text-anchor="middle" fill="currentColor">'
        f"{limit:.2f}</text></svg>"
    )


def bars(shares: Mapping[str, float]) -> str:
    """Bars of posterior probabilities."""
    step, left, width = 20, 140, 200
    rows = "".join(
        f'<text x="{left - 8}" y="{step * i + 14}" font-size="11" text-anchor="end" '
        f'fill="currentColor">{escape(name[:20])}</text>'
        f'<rect x="{left}" y="{step * i + 4}" width="{max(width * share, 1):.1f}" height="12" '
        f'fill="#3b6ea5"/>'
        for i, (name, share) in enumerate(shares.items())
    )
    size = f'width="{left + width + 10}" height="{step * len(shares) + 6}"'
    return f'<svg {size} role="img" aria-label="Probability of each model">{rows}</svg>'


def small_picture(draw: Callable[[], Any]) -> str:
    """An image of a picture; nothing where it has too many bytes for a card."""
    content = png(draw, DPI)
    if len(content) > LARGEST_PICTURE:
        return ""
    return f'<div><img style="max-width:100%" alt="" src="{data_uri(content)}"></div>'
